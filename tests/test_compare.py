"""`logitloss compare`: differences and intervals by their definition, and runs that do not go together."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import scipy.stats
from command import invoke

from logitloss.evaluate import FileError, ShapeError
from logitloss.evaluate.moments import PLAIN
from logitloss.evaluate.report.compare import Comparison, compare

N_ROWS, N_CLASSES = 2 * PLAIN + 300, 7
MEANS = {
    "nll_nats",
    "nll_bits",
    "accuracy",
    "top_5",
    "mean_reciprocal_rank",
    "entropy_nats",
    "confidence",
    "brier",
}


class Runs:
    """Files of a model, of another that is a little worse, and of their labels; JSON and rows of both."""

    def __init__(self, folder, loss="ce", n_rows=N_ROWS):
        self.folder, self.loss = folder, loss
        rng = np.random.default_rng(5)
        if loss == "ce":
            self.labels = rng.integers(0, N_CLASSES, n_rows)
            better = rng.standard_normal((n_rows, N_CLASSES)) + 2 * np.eye(N_CLASSES)[self.labels]
        else:
            self.labels = rng.integers(0, 2, n_rows)
            better = rng.standard_normal(n_rows) + 2 * self.labels - 1
        self.labels[::10] = -100
        self.logits = {"a": better, "b": better + 0.5 * rng.standard_normal(better.shape)}
        np.save(folder / "y.npy", self.labels)
        for name, logits in self.logits.items():
            np.save(folder / f"{name}.npy", logits)
            self.evaluate(name)

    def file(self, name):
        return str(self.folder / name)

    def evaluate(self, name, *options):
        paths = [self.file(f"{name}.npy"), self.file("y.npy")]
        options = ["--per-row", self.file(f"{name}-rows.npy"), "--loss", self.loss, *options]
        result = invoke("eval", *paths, "--backend", "reference", "--json", *options)
        assert result.exit_code == 0, result.output
        (self.folder / f"{name}.json").write_text(result.stdout)

    def document(self, name):
        return json.loads((self.folder / f"{name}.json").read_text())

    def change(self, name, **entries):
        (self.folder / f"{name}.json").write_text(json.dumps(self.document(name) | entries))

    def compare(self, **options):
        return compare(self.file("a.json"), self.file("b.json"), **options)

    def rows(self, name):
        """Return the figures of each row that counts, worked out in float64."""
        counted = self.labels >= 0
        x, y = self.logits[name][counted], self.labels[counted]
        if self.loss == "bce":
            loss = np.logaddexp(0, np.where(y == 1, -x, x))
            return {"nll_nats": loss, "nll_bits": loss / np.log(2), "accuracy": (x > 0) == y}
        lp = x - np.logaddexp.reduce(x, axis=1)[:, None]
        loss = -np.take_along_axis(lp, y[:, None], 1)[:, 0]
        p = np.exp(lp)
        rank = 1 + (lp > -loss[:, None]).sum(axis=1)
        return {
            "nll_nats": loss,
            "nll_bits": loss / np.log(2),
            "accuracy": rank == 1,
            "top_5": rank <= 5,
            "mean_reciprocal_rank": 1 / rank,
            "entropy_nats": -(p * lp).sum(axis=1),
            "confidence": p.max(axis=1),
            "brier": ((p - np.eye(N_CLASSES)[y]) ** 2).sum(axis=1),
        }


@pytest.fixture
def runs(tmp_path):
    return Runs(tmp_path)


def by_key(comparison: Comparison):
    return {one.kind.key: one for one in comparison.differences}


# ---- by definition ----


def test_paired(runs):
    found, a, b = by_key(runs.compare()), runs.rows("a"), runs.rows("b")
    assert {key for key, one in found.items() if one.method == "paired"} == MEANS == set(a)
    for key, one in found.items():
        if key in MEANS:
            gaps = b[key].astype(float) - a[key]
            assert one.difference == pytest.approx(gaps.mean(), rel=1e-10), key
            assert one.error == pytest.approx(scipy.stats.sem(gaps), rel=1e-10), key
            wanted = scipy.stats.norm.interval(0.95, gaps.mean(), scipy.stats.sem(gaps))
            assert one.interval == pytest.approx(wanted, rel=1e-10), key
        else:
            assert (one.method, one.error, one.interval) == (None, None, None)
    assert set(found) - MEANS == {"perplexity", "expected_calibration_error", "maximum_calibration_error"}


def test_independent(runs):
    documents = [runs.document(name) for name in "ab"]
    narrow = by_key(runs.compare())["nll_nats"]
    for found in (runs.compare(is_paired=False), without_rows(runs)):
        assert found.rows is None
        for key, one in by_key(found).items():
            if key in MEANS - {"top_5"}:
                assert one.method == "independent"
                assert one.difference == documents[1][key] - documents[0][key]
                error = np.hypot(*(document[f"{key}_standard_error"] for document in documents))
                assert one.error == pytest.approx(error, rel=1e-15)
    wide = by_key(found)["nll_nats"]
    assert narrow.difference == wide.difference
    assert narrow.error < 0.7 * wide.error


def without_rows(runs):
    for name in "ab":
        document = runs.document(name)
        del document["per_row"]
        (runs.folder / f"{name}.json").write_text(json.dumps(document))
    return runs.compare()


def test_binary(tmp_path):
    runs = Runs(tmp_path, "bce")
    found, a, b = by_key(runs.compare()), runs.rows("a"), runs.rows("b")
    for key in ("nll_nats", "nll_bits", "accuracy"):
        assert found[key].error == pytest.approx(scipy.stats.sem(b[key].astype(float) - a[key]), rel=1e-10)
    assert (found["brier"].method, found["roc_auc"].method) == ("independent", None)
    assert found["roc_auc"].verdict == "a is ahead, no interval"


def test_shards_pair(tmp_path):
    whole = Runs(tmp_path)
    parts = tmp_path / "parts"
    for name in ("a", "b", "y"):
        (parts / f"{name}.npy").mkdir(parents=True)  # a directory whose name is as the file's
        for number, part in enumerate(np.array_split(np.load(tmp_path / f"{name}.npy"), 11)):
            np.save(parts / f"{name}.npy" / f"{number}.npy", part)
    runs = Runs.__new__(Runs)
    runs.folder, runs.loss = parts, "ce"
    for name in "ab":
        runs.evaluate(name)
    found, wanted = runs.compare(), whole.compare()
    for one, other in zip(found.differences, wanted.differences, strict=True):
        assert one.difference == pytest.approx(other.difference, rel=1e-9)
        assert one.error == (other.error and pytest.approx(other.error, rel=1e-10))


# ---- in words ----


def test_table_and_json_say_the_same(runs):
    document = json.loads(invoke("compare", runs.file("a.json"), runs.file("b.json"), "--json").stdout)
    wanted = by_key(runs.compare())
    assert [one["figure"] for one in document["differences"]] == list(wanted)
    for one in document["differences"]:
        other = wanted[one["figure"]]
        assert (one["a"], one["b"], one["difference"]) == (other.a.value, other.b.value, other.difference)
        assert (one["low"], one["high"]) == (other.interval or (None, None))
        assert (one["standard_error"], one["method"], one["verdict"]) == (
            other.error,
            other.method,
            other.verdict,
        )
    for name in {*document, *document["differences"][0], *document["counts"][0]}:
        assert re.search(rf"\b{name}\b", Comparison.to_json.__doc__), name
    assert wanted["nll_nats"].verdict == "a is better, the interval excludes 0"
    table = invoke("compare", runs.file("a.json"), runs.file("b.json")).stdout
    line = next(line for line in table.splitlines() if line.startswith("accuracy"))
    assert line.rstrip().endswith(wanted["accuracy"].verdict.partition(",")[0])
    assert "better: the interval excludes 0; ahead: it includes 0, or there is none" in table
    a, b, difference, low, _, high = re.findall(r"[-+.\d]+%|to", line)
    one, unit = wanted["accuracy"], 100
    numbers = [float(number.rstrip("%")) / unit for number in (a, b, difference, low, high)]
    assert numbers == pytest.approx(
        [one.a.value, one.b.value, one.difference, *one.interval], abs=one.error / 15
    )
    assert "95 % intervals by the normal approximation, of row-wise differences" in table
    reports = [json.loads(Path(runs.file(name)).read_text()) for name in ("a.json", "b.json")]
    counted = {"labels": "labels counted"} | {
        name: report["count"] for name, report in zip("ab", reports, strict=True)
    }
    ignored = {"labels": "labels ignored"} | {
        name: report["ignored"] for name, report in zip("ab", reports, strict=True)
    }
    assert document["counts"] == [counted, ignored]
    assert re.search(rf"^labels counted +{counted['a']:,} +{counted['b']:,} *$", table, re.MULTILINE)
    unpaired = invoke("compare", runs.file("a.json"), runs.file("b.json"), "--unpaired").stdout
    assert "by the normal approximation, of the two runs as independent samples" in unpaired


def test_which_is_better(runs):
    other = compare(runs.file("b.json"), runs.file("a.json"))
    found = {key: one.verdict for key, one in by_key(other).items()}
    assert found["nll_nats"] == found["accuracy"] == "b is better, the interval excludes 0"
    assert found["perplexity"] == "b is ahead, no interval"
    assert re.match(r"(higher|lower) in b, the interval excludes 0", found["confidence"])
    same = {one.verdict for one in compare(runs.file("a.json"), runs.file("a.json")).differences}
    assert same == {"the same"}


def test_a_difference_within_its_error(tmp_path):
    runs = Runs(tmp_path, n_rows=300)
    np.save(tmp_path / "b.npy", runs.logits["a"] + 1e-3 * np.random.default_rng(1).standard_normal((300, 7)))
    runs.evaluate("b")
    one = by_key(runs.compare())["nll_nats"]
    low, high = one.interval
    assert low <= 0 <= high
    assert re.fullmatch(r"[ab] is ahead, the interval includes 0", one.verdict)


def test_a_difference_within_the_bounds(tmp_path):
    runs = Runs(tmp_path, "bce", n_rows=300)
    for key in ("roc_auc", "average_precision"):
        runs.change("a", **{key: 0.5, f"{key}_error_bound": 2e-3})
        for value, bound, verdict in (
            (0.5 + 2**-10, 1e-3, "cannot be told"),
            (0.5 - 2**-10, 0.0, "cannot be told"),
            (0.5 + 2**-8, 1e-3, "b is ahead, no interval"),
            (0.5 - 2**-8, 1e-3, "a is ahead, no interval"),
            (0.5, 1e-3, "cannot be told"),
        ):
            runs.change("b", **{key: value, f"{key}_error_bound": bound})
            assert by_key(runs.compare())[key].verdict == verdict


def test_an_infinite_loss(tmp_path):
    runs = Runs(tmp_path, n_rows=50)
    logits = runs.logits["b"].copy()
    logits[1, runs.labels[1]] = -np.inf
    np.save(tmp_path / "b.npy", logits)
    runs.evaluate("b")
    for is_paired in (True, False):
        one = by_key(runs.compare(is_paired=is_paired))["nll_nats"]
        assert one.difference == np.inf
        assert one.verdict == "a is ahead, no interval"
        text = json.loads(runs.compare(is_paired=is_paired).to_json())["differences"][0]
        assert (text["difference"], text["low"]) == ("Infinity", "NaN")
    np.save(tmp_path / "a.npy", logits)
    runs.evaluate("a")
    assert by_key(runs.compare())["nll_nats"].verdict == "cannot be told"
    result = invoke("compare", runs.file("a.json"), runs.file("b.json"), "--report", tmp_path / "page.html")
    assert result.exit_code == 0


# ---- what does not go together ----


def refused(runs, message, *options):
    result = invoke("compare", runs.file("a.json"), runs.file("b.json"), *options)
    assert (result.exit_code, result.stdout) == (1, "")
    assert re.fullmatch(f"logitloss: {message}\n", result.stderr), result.stderr


@pytest.fixture
def small(tmp_path):
    return Runs(tmp_path, n_rows=60)


def test_rows_of_other_labels(small):
    labels = small.labels.copy()
    labels[1] = (labels[1] + 1) % N_CLASSES
    np.save(small.folder / "y.npy", labels)
    small.evaluate("b")
    refused(small, r".*b.json: of other labels than .*a.json: rows do not pair; --unpaired does without")
    assert small.compare(is_paired=False).rows is None


def test_labels_of_another_type_or_store_pair(small):
    wanted = small.compare().differences
    labels = np.load(small.file("y.npy"))
    np.save(small.folder / "y.npy", labels.astype(np.int32))
    small.evaluate("b")
    assert small.compare().differences == wanted
    np.savez(small.folder / "y.npz", labels)
    run = json.loads(small.folder.joinpath("b.json").read_text())["run"]
    for one in run["inputs"]:
        if one["role"] == "target":
            one |= {"file": "y.npz", "fingerprint": "of fewer elements"}
    small.change("b", run=run)
    assert small.compare().differences == wanted


def test_rows_that_count_in_one_alone(small):
    rows = np.load(small.file("b-rows.npy"))
    rows["counted"][13] = False
    np.save(small.file("b-rows.npy"), rows)
    refused(small, r".*b-rows.npy: row 13: does not count, but does in .*a-rows.npy")


def test_rows_of_another_length_or_kind(small):
    rows = np.load(small.file("b-rows.npy"))
    np.save(small.file("b-rows.npy"), rows[:-1])
    refused(small, r".*b-rows.npy: has 59 rows, but .*a-rows.npy has 60: they do not pair")
    np.save(small.file("b-rows.npy"), rows[["loss", "hit", "counted"]])
    refused(small, r".*b-rows.npy: of type .*, but .*a-rows.npy has .*")


def test_rows_of_another_run(small):
    message = (
        r".*a-rows.npy: holds 54 rows that count, nll_nats [\d.]+, but .*b.json tells of 54, nll_nats [\d.]+"
    )
    refused(small, message, "--rows", small.file("a-rows.npy"), small.file("a-rows.npy"))


def test_rows_of_another_run_of_infinite_loss(small):
    """Means that are infinite are alike; the hits tell the runs apart, and so do the other figures."""
    for name, row in (("a", 1), ("b", 2)):
        logits = small.logits[name].copy()
        logits[row, small.labels[row]] = -np.inf
        np.save(small.file(f"{name}.npy"), logits)
        small.evaluate(name)
    assert small.document("a")["nll_nats"] == small.document("b")["nll_nats"] == "Infinity"
    small.compare()
    message = r".*a-rows.npy: holds 54 rows that count, accuracy .*, but .*b.json tells of 54, accuracy .*"
    refused(small, message, "--rows", small.file("a-rows.npy"), small.file("a-rows.npy"))


def test_rows_that_are_none(small):
    missing = small.file("none.npy")
    refused(small, f"{missing}: No such file or directory", "--rows", missing, missing)
    refused(small, r".*y.npy: holds int64, not what --per-row writes", "--rows", *[small.file("y.npy")] * 2)
    refused(small, r".*a.json: is no .npy file of --per-row", "--rows", *[small.file("a.json")] * 2)
    records = np.load(small.file("a-rows.npy"))
    names = [name for name in records.dtype.names if name != "brier"]
    np.save(small.file("fewer.npy"), records[names])
    refused(
        small, r".*fewer.npy: holds .*, not what --per-row writes", "--rows", *[small.file("fewer.npy")] * 2
    )
    (small.folder / "a-rows.npy").unlink()
    refused(small, r".*a-rows.npy: No such file or directory")
    usage = invoke("compare", "a", "b", "--unpaired", "--rows", "c", "d")
    assert usage.exit_code == 2


def test_runs_of_another_loss_or_schema(small):
    small.change("b", loss="bce")
    with pytest.raises(ShapeError, match=r"b.json: is of loss 'bce', but .*a.json of 'ce'"):
        small.compare()
    small.change("b", schema_version=2)
    with pytest.raises(FileError, match=r"b.json: of schema_version 2, expected 3: evaluate anew"):
        small.compare()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"schema_version": 3, "loss": "ce"}', "is no report"),
        (b"{", "is no JSON"),
        (b"\xff\xfe", "is no JSON"),
        (b"[" * 200_000, "is no JSON"),
        (b"[]", "is no report"),
        (b"{}", "is no report"),
    ],
)
def test_what_is_no_report(small, content, message):
    (small.folder / "b.json").write_bytes(content)
    refused(small, rf".*b.json: {message}; expected what logitloss eval --json printed")


def test_names_and_numbers_are_whole_where_they_are_wide(tmp_path):
    runs = Runs(tmp_path, n_rows=300)
    runs.change("b", perplexity=1e300)
    table = invoke("compare", runs.file("a.json"), runs.file("b.json")).stdout
    assert "…" not in table
    assert re.search(r"^negative log-likelihood, nats .* to .* \w+ is (ahead|better) *$", table, re.MULTILINE)
    assert "+1e+300" in table


def test_differences_of_runs_that_are_nearly_equal_are_whole(tmp_path):
    runs = Runs(tmp_path, n_rows=300)
    runs.logits["b"] = runs.logits["a"] * (1 + 1e-6)
    np.save(tmp_path / "b.npy", runs.logits["b"])
    runs.evaluate("b")
    table = invoke("compare", runs.file("a.json"), runs.file("b.json")).stdout
    assert "…" not in table
    for name in ("negative log-likelihood, nats", "accuracy", "Brier score"):
        assert re.search(rf"^{name} .*\d", table, re.MULTILINE), name


def test_a_page_is_not_written_over_what_was_compared(small):
    page = small.folder / "page.html"
    for name in ("a.json", "b.json", "a-rows.npy", "b-rows.npy"):
        page.symlink_to(small.file(name))
        before = (small.folder / name).read_bytes()
        result = invoke("compare", small.file("a.json"), small.file("b.json"), "--report", page)
        assert (result.exit_code, "is another file of this command" in result.stderr) == (1, True)
        assert (small.folder / name).read_bytes() == before
        page.unlink()


def test_a_confident_models_brier_scores_pair(tmp_path):
    """Of rows whose p of the label is all but 1 the differences keep their digits."""
    runs = Runs(tmp_path, n_rows=900)
    for name, by in {"a": 1.0, "b": 1.02}.items():
        hot = np.eye(N_CLASSES)[np.maximum(runs.labels, 0)]
        logits = by * (np.random.default_rng(3).standard_normal(hot.shape) + 14 * hot)
        runs.logits[name] = logits.astype(np.float32).astype(float)
        np.save(tmp_path / f"{name}.npy", logits.astype(np.float32))
        runs.evaluate(name)
    gaps = runs.rows("b")["brier"] - runs.rows("a")["brier"]
    found = by_key(runs.compare())["brier"]
    assert found.error == pytest.approx(scipy.stats.sem(gaps), rel=1e-5)


def test_figures_per_byte_are_of_one_text(small):
    for name, n_bytes in {"a": "300", "b": "400"}.items():
        small.evaluate(name, "--bytes", n_bytes, "--words", "50")
    assert {"bits_per_byte", "perplexity_per_byte"}.isdisjoint(by_key(small.compare()))
    assert "perplexity_per_word" in by_key(small.compare())


def test_shards_left_out_pair_by_name(tmp_path):
    for name, bad in {"a": 1, "b": 2}.items():
        (tmp_path / name).mkdir()
        (tmp_path / f"y{name}").mkdir()
        for number in range(4):
            logits = np.random.default_rng(number).standard_normal((9, 3))
            logits[0, 0] = np.nan if number == bad else 0
            np.save(tmp_path / name / f"{number}.npy", logits)
            np.save(
                tmp_path / f"y{name}" / f"{number}.npy", (np.arange(9) % 3).astype(f"i{'48'[name == 'b']}")
            )
        paths = [tmp_path / name, tmp_path / f"y{name}", "--per-row", tmp_path / f"{name}-rows"]
        result = invoke("eval", *paths, "--on-error", "skip", "--json")
        (tmp_path / f"{name}.json").write_text(result.stdout)
    with pytest.raises(FileError, match="are of other shards, as some are skipped"):
        compare(str(tmp_path / "a.json"), str(tmp_path / "b.json"))


@pytest.mark.parametrize(
    "change",
    [
        {"run": None},
        {"per_row": None},
        {"count": "450"},
        {"nll_nats": 10**400},
        {"nll_histogram": "x"},
        {"calibration": [3]},
        {"run": {"inputs": [{}]}},
        {"seconds": "NaN"},
        {"rows_per_second": None},
        {"accuracy_by_rank": ["NaN"]},
    ],
    ids=str,
)
def test_a_report_that_was_changed(small, change):
    small.change("a", **change)
    with pytest.raises(FileError, match="is no report; expected what logitloss eval --json printed"):
        small.compare()


@pytest.mark.parametrize("name", ["a", "b"])
@pytest.mark.parametrize(
    "change",
    [
        {"warnings": 5},
        {"calibration": [{}]},
        {"nll_histogram": [{}]},
        {"skipped": [{}]},
        {"run": {"options": 5}},
        {"count": 0},
    ],
    ids=str,
)
def test_a_report_that_cannot_be_drawn(small, name, change):
    small.change(name, **change)
    page = small.folder / "page.html"
    message = f"{small.file(f'{name}.json')}: is no report; expected what logitloss eval --json printed"
    refused(small, message, "--unpaired", "--report", page)
    assert not page.exists()


def test_reports_that_cannot_be_drawn_side_by_side(small):
    small.change("b", calibration=None)
    message = f"{small.file('a.json')}, {small.file('b.json')}: is no report; expected what .* printed"
    refused(small, message, "--report", small.file("page.html"))


def test_reports_of_extremes_are_drawn(small):
    for name, array in {"a": small.logits["a"], "b": np.where(small.logits["b"] > 1, -np.inf, 0)}.items():
        np.save(small.folder / f"{name}.npy", array)
        small.evaluate(name, "--per-class", "--group-by", small.file("y.npy"))
    np.save(small.folder / "y.npy", np.full(60, -100))
    small.evaluate("b")
    for name in "ab":
        page = small.folder / f"{name}.html"
        files = small.file(f"{name}.json"), small.file("b.json")
        assert invoke("compare", *files, "--unpaired", "--report", page).exit_code == 0
        assert "Differences" in page.read_text(encoding="utf-8")
