"""Padding that counts: what looks like it is told, what does not is not, however it is cut."""

import json
import warnings

import numpy as np
import pytest
from cases import rng_for
from command import invoke

import logitloss.evaluate.padding
import logitloss.evaluate.shard
from logitloss.evaluate import EvaluationState, PaddingWarning, evaluate, evaluate_files
from logitloss.evaluate.padding import LONG, EndRuns

N_TEXTS, LENGTH, N_TOKENS, EOS = 40, 64, 500, 499


def texts(seed, shape=(N_TEXTS, LENGTH)):
    """Return tokens as frequent as words are, so that some repeat by themselves, and never the last one."""
    return (rng_for("padding", seed).zipf(1.5, shape) - 1) % (N_TOKENS - 1)


def lengths(seed, least=20):
    return rng_for("lengths", seed).integers(least, LENGTH + 1, N_TEXTS)


def padded(tokens, n_kept, pad, left=False):
    """Return texts of which so many tokens are kept, the first or the last."""
    place = np.arange(tokens.shape[1])
    if left:
        place = place[::-1]
    return np.where(place < np.asarray(n_kept)[:, None], tokens, pad)


def told(tokens, counted=None):
    runs = EndRuns()
    runs.add(tokens, counted)
    return runs.warnings()


# ---- what is told ----


@pytest.mark.parametrize("trial", range(5))
@pytest.mark.parametrize("pad", [0, EOS])
@pytest.mark.parametrize("left", [False, True])
def test_padding_on_either_side(trial, pad, left):
    n_kept = lengths(trial)
    tokens = padded(texts(trial), n_kept, pad, left)
    (line,) = told(tokens)
    place = "start" if left else "end"
    run = np.argmax((tokens if left else tokens[:, ::-1]) != pad, axis=1)
    run = run[run >= LONG]
    assert line.startswith(
        f"{run.sum():,} positions that count look like padding: label {pad} fills the {place}"
    )
    assert f" of {run.size} sequences, for {run.min()} to {run.max()} positions each; " in line
    assert line.endswith(f"--mask, or with --ignore-index {pad} if that label is nothing else")


def test_the_label_that_ends_a_text_as_padding():
    n_kept = lengths("eos")
    tokens = padded(texts("eos"), n_kept, EOS)
    counted = np.arange(LENGTH) <= n_kept[:, None]  # the first one is a token
    assert len(told(tokens)) == 1
    assert told(tokens, counted) == []


def test_one_padded_text():
    tokens = texts("one", (N_TEXTS, LENGTH))
    tokens[-1, 30:] = EOS
    (line,) = told(tokens)
    assert line.startswith(
        f"34 positions that count look like padding: label {EOS} fills the end of 1 sequence,"
    )
    flat = texts("flat", (3000,))
    assert told(flat) == []
    flat[-20:] = EOS
    (line,) = told(flat)
    assert line.startswith(
        f"20 positions that count look like padding: label {EOS} fills the end of 1 sequence,"
    )
    flat[-20:-1] = np.arange(19)
    assert told(flat) == []


def test_texts_of_which_some_are_nothing_but_padding():
    n_kept = lengths("empty")
    n_kept[:10] = 0
    tokens = padded(texts("empty"), n_kept, EOS)
    assert told(tokens) == told(tokens[10:])
    assert len(told(tokens)) == 1


# ---- what is not ----


@pytest.mark.parametrize("trial", range(5))
@pytest.mark.parametrize("n_tokens", [2, 4, 30, N_TOKENS])
@pytest.mark.parametrize("shape", [(3000, 3), (2000, 6), (300, 20), (40, 300), (2, 4000), (5000,)])
def test_texts_without_padding(trial, n_tokens, shape):
    rng = rng_for("plain", trial, n_tokens, shape)
    assert told(rng.integers(0, n_tokens, shape)) == []
    # as repetitive as the indentation of a program: a label goes on with probability 0.7
    stays = (rng.random(shape) < 0.7) & (texts(trial, shape) == 0)
    assert told(np.where(stays, 0, rng.integers(0, n_tokens, shape))) == []


def test_runs_that_a_cut_goes_through():
    stream = texts("cut", (N_TEXTS * LENGTH * 5,))
    rng = rng_for("cut places")
    for first in rng.integers(0, stream.size, 1500):  # rules of up to thirty dashes
        stream[first : first + rng.integers(4, 30)] = 7
    assert told(stream.reshape(-1, LENGTH)) == []


def test_padding_that_hardly_weighs():
    tokens = texts("many", (1000, LENGTH))
    tokens[-1, -63:] = EOS
    assert told(tokens) == []  # 63 of 64,000
    assert len(told(tokens[500:])) == 1


def test_maps_tags_and_states():
    rng = rng_for("maps")
    # an object in an image: background to the edges; and one that always lies to the left
    rows, columns = np.mgrid[:64, :64]
    for across in (slice(20, 45), slice(2, 12)):
        images = np.zeros((10, 64, 64), int)
        for image in images:
            middle = rng.integers(across.start, across.stop), rng.integers(20, 45)
            image[(columns - middle[0]) ** 2 + (rows - middle[1]) ** 2 < rng.integers(40, 300)] = 1
        assert told(images) == []
    # two regions side by side
    assert told(np.where(columns < rng.integers(20, 40, 64)[:, None], 3, 5)) == []
    # mostly "outside"
    tags = np.where(rng.random((200, 50)) < 0.12, rng.integers(1, 9, (200, 50)), 0)
    assert told(tags) == []
    # states that last
    changes = rng.random((100, 200)) < 0.05
    assert told(np.cumsum(changes, axis=1) * 7 % 5) == []
    # an ending that all share
    tokens = texts("form")
    tokens[:, -6:] = EOS
    assert told(tokens) == []


def test_classes_in_order_are_none():
    labels = np.repeat(np.arange(10), 50)
    state = evaluate(np.zeros((500, 10)), labels, backend="reference")
    assert state.end_runs == EndRuns()
    assert told(labels.reshape(10, 50)) == []
    assert told(np.sort(rng_for("sorted").integers(0, 10, (50, 30)), axis=1)) == []


def test_what_does_not_count_is_none():
    n_kept = lengths("not counted")
    tokens = padded(texts("not counted"), n_kept, EOS)
    keeps = np.arange(LENGTH) < n_kept[:, None]
    options = {"axis": -1, "backend": "reference"}
    logits = np.zeros((N_TEXTS, LENGTH, N_TOKENS), np.float16)
    for more in ({"mask": keeps}, {"ignore_index": EOS}, {"mask": keeps, "shift": True}):
        assert evaluate(logits, tokens, **options, **more).compute().warnings == ()
    assert evaluate(logits, np.where(keeps, tokens, -100), **options).compute().warnings == ()
    with pytest.warns(PaddingWarning, match=f"label {EOS} fills the end"):
        evaluate(logits, tokens, **options)
    with pytest.warns(PaddingWarning, match="label 0 fills the start"):
        evaluate(logits, padded(texts("left"), n_kept, 0, left=True), shift=True, **options)
    binary = np.zeros((N_TEXTS, LENGTH), np.uint8)
    binary[np.arange(N_TEXTS), n_kept - 1] = 1
    assert evaluate(binary.astype(np.float32), binary, loss="bce").compute().warnings == ()


# ---- however it is cut ----


def slow(tokens, counted):
    """Return the runs of each label and place one by one, and the positions."""
    runs, positions = {}, 0
    for text, kept in zip(
        tokens.reshape(-1, tokens.shape[-1]), counted.reshape(-1, tokens.shape[-1]), strict=True
    ):
        found, first = [], 0
        for i in range(1, text.size + 1):
            if i == text.size or text[i] != text[first] or not (kept[i] and kept[first]):
                found.append((first, i))
                first = i
        longest = max(stop - start for start, stop in found)
        if longest == kept.sum() >= LONG:
            continue
        positions += int(kept.sum())
        for start, stop in found:
            if stop - start >= LONG:
                place = "start" if start == 0 else "end" if stop == text.size else "elsewhere"
                runs.setdefault((int(text[start]), place), []).append(stop - start)
    return positions, {key: (len(v), sum(v), min(v), max(v)) for key, v in runs.items()}


@pytest.mark.parametrize("trial", range(10))
def test_runs_are_those_found_one_by_one(trial):
    rng = rng_for("slow", trial)
    tokens = rng.integers(0, 2, (2, 30, 10 + trial))
    tokens[rng.random(tokens.shape) < 0.1] = 2
    counted = rng.random(tokens.shape) < 0.95
    tokens[:, 3] = 1
    counted[0, 3], counted[1, 3] = True, np.arange(10 + trial) < 8
    runs = EndRuns()
    runs.add(tokens, counted)
    assert (runs.positions, runs.runs) == slow(tokens, counted)
    parts, together = [EndRuns() for _ in range(3)], EndRuns()
    for number, part in enumerate(np.array_split(np.arange(60), 7)):
        flat = [array.reshape(60, -1)[part] for array in (tokens, counted)]
        parts[number % 3].add(*flat)
    for part in reversed(parts):
        together.merge(part)
    assert together == runs
    assert EndRuns.from_dict(json.loads(json.dumps(runs.to_dict()))) == runs


@pytest.mark.parametrize("most_labels", [1 << 18, 13])
@pytest.mark.parametrize("shape", [(N_TEXTS, LENGTH), (4, 10, LENGTH), (N_TEXTS * LENGTH,)])
def test_blocks_do_not_show(shape, most_labels, monkeypatch, tmp_path):
    for module in (logitloss.evaluate.padding, logitloss.evaluate.shard):
        monkeypatch.setattr(module, "MOST_LABELS", most_labels)
    tokens = padded(texts("blocks"), lengths("blocks"), EOS).reshape(shape)
    mask = rng_for("blocks mask").random(shape) < 0.98
    np.save(tmp_path / "x.npy", np.zeros((*shape, N_TOKENS), np.float16))
    np.save(tmp_path / "y.npy", tokens)
    np.save(tmp_path / "m.npy", mask)
    wanted = EndRuns()
    wanted.add(tokens[..., 1:], mask[..., 1:])
    options = {"axis": -1, "shift": True, "mask_path": str(tmp_path / "m.npy"), "backend": "reference"}
    for chunk_rows in (1, 7, 63, 64, 100, 700, None):
        files = str(tmp_path / "x.npy"), str(tmp_path / "y.npy")
        if chunk_rows == 1 and most_labels > 13:
            continue
        found = evaluate_files(*files, chunk_rows=chunk_rows, **options).state
        assert found.end_runs == wanted
    assert wanted.runs


def test_states_keep_and_merge_it():
    n_kept = lengths("states")
    tokens = padded(texts("states"), n_kept, EOS)
    logits = np.zeros((N_TEXTS, LENGTH, N_TOKENS), np.float16)
    whole = EvaluationState()
    whole.update(logits, tokens, axis=-1, backend="reference")
    assert len(whole.compute().warnings) == 1
    halves = [EvaluationState(), EvaluationState()]
    for state, part in zip(halves, (slice(0, 15), slice(15, None)), strict=True):
        state.update(logits[part], tokens[part], axis=-1, backend="reference")
    halves[1].merge(EvaluationState.from_dict(json.loads(json.dumps(halves[0].to_dict()))))
    assert halves[1].end_runs == whole.end_runs
    assert halves[1].compute().warnings == whole.compute().warnings
    with pytest.raises(ValueError, match="runs at the 'middle' of sequences"):
        EndRuns.from_dict({"positions": 3, "runs": [[0, "middle", 1, 4, 4, 4]]})
    with pytest.raises(ValueError, match="-1 is no count"):
        EndRuns.from_dict({"positions": -1, "runs": []})


# ---- who is told ----


def test_the_command_and_python_tell_it(tmp_path):
    tokens = padded(texts("told"), lengths("told"), EOS)
    logits = np.zeros((N_TEXTS, LENGTH, N_TOKENS), np.float16)
    for name, array in {"x": logits, "y": tokens}.items():
        np.save(tmp_path / f"{name}.npy", array)
    (line,) = told(tokens)
    files = [str(tmp_path / "x.npy"), str(tmp_path / "y.npy")]
    command = ["eval", *files, "--axis", "-1", "--backend", "reference"]
    result = invoke(*command, "--json")
    assert (result.exit_code, result.stderr) == (0, f"logitloss: warning: {line}\n")
    assert json.loads(result.stdout)["warnings"] == [line]
    assert invoke(*command).stderr == f"logitloss: warning: {line}\n"
    result = invoke(*command, "--ignore-index", str(EOS), "--json")
    assert (result.stderr, json.loads(result.stdout)["warnings"]) == ("", [])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        state = evaluate(*files, axis=-1, backend="reference")
        evaluate(logits, tokens, axis=-1, backend="reference")
        evaluate([(logits, tokens)], axis=-1, backend="reference")
    assert [(one.category, str(one.message), one.filename) for one in caught] == [
        (PaddingWarning, line, __file__)
    ] * 3
    assert state.compute().warnings == (line,)
