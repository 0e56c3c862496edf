"""The state file of an evaluation of shards: it goes on after repairs, or without what is bad, or refuses."""

import json
import os
import tempfile

import numpy as np
import pytest
from shards import BAD, N_CLASSES, SIZES, Shards, options_of

from logitloss.evaluate import EvaluationError, FileError, LabelError, LogitError, StateError
from logitloss.evaluate.errors import OutputError


@pytest.fixture
def state_file(shards):
    return shards.folder / "state.json"


def test_after_repair_it_goes_on(shards, bad, state_file):
    error = bad[1]
    options = {"state_file": state_file, **options_of(shards)}
    with pytest.raises(error):
        shards.evaluate(**options)
    document = json.loads(state_file.read_text())
    before = sum(SIZES[:BAD])
    assert document["n_through"] == BAD
    assert document["done"] - before in (0, 30, 60)
    (shards.folder / "whole").mkdir()
    whole = Shards(shards.folder / "whole")
    for name in ("logits", "labels", "keys"):
        array = whole.load(name, BAD)
        if error is LogitError:
            array[63] = 0  # counted now; it may have been ignored
        if os.path.islink(shards.file(name, BAD)):
            os.unlink(shards.file(name, BAD))
        shards.save(name, BAD, array)
    found = shards.evaluate(**options)
    assert found.n_rows == sum(SIZES) - document["done"]
    assert found.state == shards.state(groups=True)
    rows = np.concatenate([np.load(shards.folder / "rows" / f"part-{i + 1}.npy") for i in range(len(SIZES))])
    assert rows["counted"].sum() == found.state.count
    assert shards.evaluate(**options).state == found.state


def test_what_failed_goes_on_without_the_shard(shards, bad, state_file):
    options = {"state_file": state_file, **options_of(shards)}
    with pytest.raises(EvaluationError):
        shards.evaluate(**options)
    wanted = shards.state(without=[BAD], groups=True)
    for _ in range(2):  # the second finds all done, and tells the same
        found = shards.evaluate(on_error="skip", **options)
        assert found.state == wanted
        assert [file for file, _ in found.skipped] == [bad[0]]
    assert found.n_rows == 0
    with pytest.raises(
        StateError, match=r"has skipped .*part-4.npy \(.*\), and goes on with --on-error skip"
    ):
        shards.evaluate(**options)


def stopped_in(shards, number, state_file, **options):
    """Stop in the middle of a shard, which is bad for that long."""
    labels = shards.load("labels", number)
    shards.change("labels", number, -1, N_CLASSES)
    with pytest.raises(LabelError):
        shards.evaluate(state_file=state_file, **options)
    shards.save("labels", number, labels)


@pytest.mark.parametrize("of", ["through", "begun"])
@pytest.mark.parametrize("what", ["size", "dtype", "logits", "labels", "keys"])
def test_a_state_of_other_shards_is_refused(shards, state_file, of, what):
    options = {"groups_path": str(shards.folder / "keys")}
    stopped_in(shards, 7, state_file, **options)
    number = {"through": 2, "begun": 7}[of]
    argument = {"labels": "target", "keys": "groups"}.get(what, "logits")
    if what == "size":
        for name in ("logits", "labels", "keys"):
            shards.save(name, number, shards.load(name, number)[:-1])
    elif what == "dtype":
        shards.save("logits", number, shards.load("logits", number).astype(np.float64))
    elif what == "logits":
        shards.change("logits", number, 0, 1.0)
    elif what == "labels":
        shards.change("labels", number, slice(0, 5), 6)
    else:
        shards.change("keys", number, slice(0, 5), "b")
    before = state_file.read_bytes()
    message = rf"with {argument} of .*part-{number + 1}.npy .*, this one has"
    for on_error in ("fail", "skip"):
        with pytest.raises(StateError, match=message):
            shards.evaluate(state_file=state_file, on_error=on_error, **options)
    assert state_file.read_bytes() == before


def test_a_state_of_other_options_or_as_many_shards_is_refused(shards, state_file):
    stopped_in(shards, 7, state_file)
    with pytest.raises(StateError, match=r"with options .*, this one has"):
        shards.evaluate(state_file=state_file, ignore_index=3)
    for name in ("logits", "labels"):
        os.unlink(shards.file(name, 11))
    with pytest.raises(StateError, match="with shards 12, this one has 11"):
        shards.evaluate(state_file=state_file)


def test_what_follows_may_be_replaced(shards, state_file):
    stopped_in(shards, 7, state_file)
    shards.change("logits", 7, 39, 1.0)
    shards.change("logits", 9, 0, 1.0)
    shards.save("logits", 10, np.ones((5, N_CLASSES)))
    shards.save("labels", 10, np.arange(5))
    assert shards.evaluate(state_file=state_file).state == shards.state()


def test_a_shard_that_is_through_and_gone_is_not_skipped(shards, state_file):
    stopped_in(shards, 7, state_file)
    os.truncate(shards.file("logits", 2), 50)
    for on_error in ("fail", "skip"):
        with pytest.raises(FileError, match=r"part-3.npy: truncated"):
            shards.evaluate(state_file=state_file, on_error=on_error)


def test_a_full_disk_is_no_fault_of_a_shard(shards, state_file, monkeypatch):
    np.savez_compressed(shards.folder / "logits" / "part-4.npz", shards.load("logits", BAD))
    os.unlink(shards.file("logits", BAD))
    with open("/dev/full", "wb", buffering=0) as full, monkeypatch.context() as patch:
        patch.setattr(tempfile, "TemporaryFile", lambda prefix: full)
        message = r"part-4.npz: what it holds, unpacked, does not fit into .* \(.*No space left on device\)$"
        with pytest.raises(OutputError, match=message):
            shards.evaluate(on_error="skip", state_file=state_file)
    wanted = shards.state(without=[BAD])
    found = shards.evaluate(on_error="skip", state_file=state_file)
    assert (found.skipped, found.state.n_rows) == ([], wanted.n_rows + SIZES[BAD])


def test_a_state_that_cannot_be_written_is_no_fault_of_a_shard(shards):
    with pytest.raises(FileError, match=r"missing/state.json: No such file"):
        shards.evaluate(on_error="skip", state_file=shards.folder / "missing" / "state.json", save_every=0)
    (shards.folder / "rows").touch()
    with pytest.raises(FileError, match="rows: File exists"):
        shards.evaluate(on_error="skip", per_row_path=str(shards.folder / "rows"))
