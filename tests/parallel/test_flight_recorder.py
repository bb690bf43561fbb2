"""The flight recorder tells who waits for whom, from notes that outlive the process."""

import json
import os
import signal
import subprocess
import time
from contextlib import ExitStack
from pathlib import Path

import pytest

from parallel.flight_recorder import CommunicationError, FlightRecorder

CLOSED = "[/gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:1: ... crashing"
TIMED_OUT = "[/gloo/transport/tcp/unbound_buffer.cc:78] Timed out waiting 3000ms for recv operation"


def recorders(folder: Path, count: int) -> list[FlightRecorder]:
    return [FlightRecorder(folder / "notes", rank, count) for rank in range(count)]


def fail(recorder: FlightRecorder, what: str, message: str, seconds: float = 0.0) -> str:
    """Let a collective fail and return what is told."""
    with pytest.raises(CommunicationError) as caught:
        run_failing(recorder, (what,), message, seconds=seconds)
    return str(caught.value)


def run_failing(
    recorder: FlightRecorder,
    what: tuple[str, ...],
    message: str,
    *,
    is_pure: bool = True,
    seconds: float = 0.0,
) -> None:
    """Raise inside things that go on within each other, the last of which can be pure."""
    with ExitStack() as stack:
        for name in what:
            stack.enter_context(recorder.watch(name, is_pure=is_pure and name == what[-1]))
        time.sleep(seconds)
        raise RuntimeError(message)


def test_message_names_what_each_rank_did(tmp_path: Path) -> None:
    first, second, third = recorders(tmp_path, 3)
    for recorder in (first, second):
        recorder.step = 7
        with recorder.watch("ring, step 1 of 2, of layers.3 (full_attention) on axis ring"):
            pass
    with second.watch("all_gather of layers.4 (linear_attention) on axis sp"):
        text = fail(first, "ring, step 2 of 2, of layers.3 (full_attention) on axis ring", CLOSED)
    lines = text.splitlines()
    assert lines[0] == (
        "rank 0: in step 7, ring, step 2 of 2, of layers.3 (full_attention) on axis ring failed: "
        "a rank it talks to is gone, its connection is closed"
    )
    completed = "last completed ring, step 1 of 2, of layers.3 (full_attention) on axis ring"
    assert lines[1].startswith(
        f"  rank 0: {completed} (collective 1, in step 7); then ring, step 2"
    )
    assert lines[2].startswith(f"  rank 1: {completed} (collective 1, in step 7); since 0.")
    assert lines[2].endswith(" s in all_gather of layers.4 (linear_attention) on axis sp")
    assert lines[3].startswith("  rank 2: last completed nothing; since 0.")
    assert lines[3].endswith(" s computing")
    assert lines[4] == "  most likely at fault: rank 2, silent for longest"
    assert third.count == 0


def test_time_without_answer_is_told(tmp_path: Path) -> None:
    text = fail(recorders(tmp_path, 2)[0], "barrier", TIMED_OUT, seconds=0.2)
    assert "barrier failed: no answer in 0.2 s (parallel.timeout_seconds is the limit)" in text


def test_rank_that_has_told_is_not_at_fault(tmp_path: Path) -> None:
    first, second, third = recorders(tmp_path, 3)
    with third.watch("all_reduce"):
        fail(second, "ring", CLOSED)
        with first.watch("halo"):
            pass
    text = fail(first, "ring", CLOSED)
    assert "rank 1: last completed nothing; then ring failed: a rank it talks to is gone" in text
    assert text.endswith("most likely at fault: rank 2, silent for longest")
    fail(third, "ring", CLOSED)
    assert "at fault: none of the other ranks, which waited as" in fail(first, "ring", CLOSED)


@pytest.mark.parametrize(
    ("number", "state"), [(signal.SIGSTOP, "stopped"), (signal.SIGKILL, "gone")]
)
def test_process_that_is_stopped_or_gone_is_seen(
    tmp_path: Path, number: signal.Signals, state: str
) -> None:
    first, second, third = recorders(tmp_path, 3)
    child = subprocess.Popen(["sleep", "60"])
    second._place["process"] = child.pid
    try:
        with third.watch("ring"), second.watch("halo"):
            child.send_signal(number)
            while not (text := fail(first, "ring", TIMED_OUT)).endswith(f"process is {state}"):
                time.sleep(0.01)
        assert f"in halo, process is {state}" in text
        assert text.endswith(f"at fault: rank 1, whose process is {state}")
    finally:
        child.kill()
        child.wait()


def test_error_of_the_work_beside_is_left_as_it_is(tmp_path: Path) -> None:
    recorder = recorders(tmp_path, 2)[0]
    with pytest.raises(RuntimeError, match="shapes") as caught:
        run_failing(recorder, ("backward", "inner"), "shapes do not fit", is_pure=False)
    assert type(caught.value) is RuntimeError
    assert recorder.pending == ""
    with pytest.raises(CommunicationError, match="backward failed: a rank it talks to is gone"):
        run_failing(recorder, ("backward",), CLOSED, is_pure=False)


def test_inner_collective_is_told_once(tmp_path: Path) -> None:
    recorder = recorders(tmp_path, 2)[0]
    with pytest.raises(CommunicationError, match=r"^rank 0: before the first step, ring failed"):
        run_failing(recorder, ("backward", "ring"), CLOSED)


def test_start_of_a_collective_leaves_no_note(tmp_path: Path) -> None:
    recorder = recorders(tmp_path, 1)[0]
    with recorder.watch("ring"):
        pass
    with recorder.watch("the start of halo", is_noted=False):
        note = json.loads((tmp_path / "notes" / "rank_00000.json").read_text())
    assert (recorder.completed, recorder.count, note["pending"]) == ("ring", 1, "")


def test_notes_of_an_earlier_run_do_not_count(tmp_path: Path) -> None:
    folder = tmp_path / "notes"
    for recorder in recorders(tmp_path, 3):
        with recorder.watch("old"):
            pass
    for rank in (1, 2):
        path = folder / f"rank_{rank:05d}.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"time": time.time() - 3600}))
    first = FlightRecorder(folder, 0, 2)
    assert sorted(os.listdir(folder)) == ["rank_00000.json", "rank_00001.json"]
    text = fail(first, "ring", CLOSED)
    assert "rank 1: has left no note in this run" in text
    assert text.endswith("at fault: rank 1, silent for longest")


def test_folder_goes_with_the_last_rank_of_a_good_run(tmp_path: Path) -> None:
    first, second = recorders(tmp_path, 2)
    first.close()
    first.close()
    assert os.listdir(tmp_path / "notes") == ["rank_00001.json"]
    second.close()
    assert not (tmp_path / "notes").exists()


def test_without_folder_only_the_own_failure_is_told() -> None:
    text = fail(FlightRecorder(None, 1, 2), "broadcast of the run directory", CLOSED)
    assert text == (
        "rank 1: before the first step, broadcast of the run directory failed: a rank it talks to "
        "is gone, its connection is closed"
    )


def test_long_names_keep_the_note_readable(tmp_path: Path) -> None:
    first, second = recorders(tmp_path, 2)
    with second.watch("é" * 5000):
        assert "rank 1: last completed nothing; since" in fail(first, "ring", CLOSED)
    with second.watch("short"):
        pass
    assert "rank 1: last completed short" in fail(first, "ring", CLOSED)
