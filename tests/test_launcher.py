"""The GPU queue, its Hydra launcher, and Slurm through a stand-in sbatch."""

import dataclasses
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from hydra_plugins.gpu_queue import jobs as queue
from hydra_plugins.gpu_queue.jobs import Job, Slot, find_slots, last_error, run_jobs

ROOT = Path(__file__).parents[1]
# Writes what it ran on and when; a plain Python start, so that a test may take many.
SCRIPT = """
import json, os, sys, time
began = time.time()
time.sleep(float(sys.argv[2]))
json.dump({"gpu": os.environ["CUDA_VISIBLE_DEVICES"], "began": began, "ended": time.time()},
          open(sys.argv[1], "w"))
if len(sys.argv) > 3:
    sys.exit("error: " + sys.argv[3])
"""
APP = """
import os
from pathlib import Path
import hydra
from matryoshka_lora.cli import exit_with_one_line

@hydra.main(version_base="1.3", config_path=".", config_name="app")
def main(cfg):
    if cfg.x == 2 and cfg.fail:
        raise ValueError("x is two")
    Path(cfg.output_dir, f"x{cfg.x}").write_text(os.environ.get("CUDA_VISIBLE_DEVICES", "unset"))

if __name__ == "__main__":
    with exit_with_one_line():
        main()
"""
APP_CONFIG = """
output_dir: out
x: 0
fail: false
hydra:
  output_subdir: null
  job: {chdir: false}
  run: {dir: .}
  sweep: {dir: "${output_dir}/multirun", subdir: .}
"""


def gpu_slots(count: int) -> list[Slot]:
    return [Slot(f"GPU {i}", {"CUDA_VISIBLE_DEVICES": str(i)}) for i in range(count)]


def test_jobs_share_the_slots_and_a_failed_one_stops_nobody(tmp_path, capsys):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    names = [f"job/{i}" for i in range(5)]
    jobs = [Job(name, (str(tmp_path / f"{i}.json"), "0.15")) for i, name in enumerate(names)]
    jobs[1] = Job(names[1], (*jobs[1].overrides, "no memory"))
    outcomes = run_jobs(jobs, gpu_slots(2), script, tmp_path / "logs")
    assert [o.job.name for o in outcomes] == names
    assert [o.error for o in outcomes] == [None, "exit code 1: no memory", None, None, None]
    assert outcomes[1].log.read_text() == "error: no memory\n"
    assert outcomes[1].log == tmp_path / "logs" / "job-1.log"
    ran = [json.loads((tmp_path / f"{i}.json").read_text()) for i in range(5)]
    assert {r["gpu"] for r in ran} == {"0", "1"}
    for gpu in "01":
        mine = sorted((r["began"], r["ended"]) for r in ran if r["gpu"] == gpu)
        for (_, ended), (began, _) in itertools.pairwise(mine):
            assert began >= ended, "one job a GPU at a time"
    assert capsys.readouterr().out == ""


@pytest.mark.slow
def test_a_job_of_several_processes_gets_another_try_when_one_is_killed(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "import os, sys\n"
        "if os.environ['RANK'] == '0' and sys.argv[1] == 'error':\n"
        "    sys.exit('error: of this job')\n"
        "if os.environ['RANK'] == '1' and sys.argv[1] != 'error':\n"
        "    tried = os.path.exists(sys.argv[2])\n"
        "    open(sys.argv[2], 'w').close()\n"
        "    if sys.argv[1] == 'always' or not tried:\n"
        "        os.kill(os.getpid(), 9)\n"
    )
    jobs = [
        Job(kind, (kind, str(tmp_path / f"{kind}.tried"))) for kind in ("once", "always", "error")
    ]
    slot = Slot("two processes", {"CUDA_VISIBLE_DEVICES": ""}, 2)
    once, always, error = run_jobs(jobs, [slot], script, tmp_path / "logs")
    assert once.error is None
    assert always.error == "exit code -9: process 1 was killed (SIGKILL)"
    assert error.error == "exit code 1: of this job"
    for outcome in (once, always):
        assert "Traceback" not in outcome.log.read_text()


def test_outcomes_bring_more_jobs_also_to_slots_that_have_none(tmp_path):
    (script := tmp_path / "script.py").write_text(SCRIPT)

    def job(name: str) -> Job:
        return Job(name, (str(tmp_path / f"{name}.json"), "0.15"))

    asked: list[str] = []

    def more(outcome):
        asked.append(outcome.job.name)
        return [job("1"), job("2"), job("3")] if outcome.job.name == "0" else []

    outcomes = run_jobs([job("0")], gpu_slots(2), script, tmp_path / "logs", more=more)
    assert [o.job.name for o in outcomes] == ["0", "1", "2", "3"] and sorted(asked) == [*"0123"]
    ran = [json.loads((tmp_path / f"{i}.json").read_text()) for i in range(1, 4)]
    assert {r["gpu"] for r in ran} == {"0", "1"}
    with pytest.raises(RuntimeError, match="no plan"):
        run_jobs(
            *([job("4"), job("5")], gpu_slots(2), script, tmp_path / "logs"),
            more=lambda outcome: (_ for _ in ()).throw(RuntimeError("no plan")),
        )


def test_a_worker_takes_all_jobs_of_its_slot_and_is_replaced_when_killed(tmp_path, caplog):
    """The process is the same until it is killed, and the job that killed it gets another try."""
    script = tmp_path / "script.py"
    script.write_text(
        "import os, sys\n"
        "print(os.getpid(), flush=True)\n"
        "tried = os.path.exists(sys.argv[2])\n"
        "open(sys.argv[2], 'w').close()\n"
        "if sys.argv[1] == 'always' or (sys.argv[1] == 'once' and not tried):\n"
        "    os.kill(os.getpid(), 9)\n"
        "if sys.argv[1] == 'error':\n"
        "    raise RuntimeError('of this job')\n"
    )
    kinds = ["fine", "error", "once", "always", "fine"]
    jobs = [Job(f"{i}{kind}", (kind, str(tmp_path / str(i)))) for i, kind in enumerate(kinds)]
    outcomes = run_jobs(jobs, gpu_slots(1), script, tmp_path / "logs")
    assert caplog.messages.count("killed by signal 9, is run again: 2once") == 1
    errors = [outcome.error for outcome in outcomes]
    assert errors[0] is errors[2] is errors[4] is None
    assert errors[1] == "exit code 1: RuntimeError: of this job"
    assert errors[3] is not None and errors[3].startswith("exit code -9")
    first, failed, once, always, last = (
        [line for line in outcome.log.read_text().splitlines() if line.isdigit()]
        for outcome in outcomes
    )
    assert first == failed == once[:1] and once[1:] == always[:1]
    assert len({*first, *once, *always, *last}) == 4 and len(once) == len(always) == 2


def test_a_card_that_fails_is_left_out_and_its_job_goes_to_another(tmp_path, caplog):
    """GPU 0 breaks under its first job, GPU 1 under none; job 2 fails on its own account."""
    script = tmp_path / "script.py"
    script.write_text(
        "import os, sys\n"
        "print('on', os.environ['CUDA_VISIBLE_DEVICES'], flush=True)\n"
        "if os.environ['CUDA_VISIBLE_DEVICES'] in sys.argv[2]:\n"
        "    sys.exit('error: CUDA error: an illegal memory access was encountered')\n"
        "if sys.argv[1] == '2':\n"
        "    sys.exit('error: CUDA out of memory')\n"
    )
    slots = [dataclasses.replace(slot, gpus=(str(i),)) for i, slot in enumerate(gpu_slots(2))]
    asked = []

    def run(broken):
        def card_error(slot):
            asked.append(slot.name)
            return "CUDA error: unspecified launch failure" if slot.gpus[0] in broken else None

        jobs = [Job(f"{broken}{i}", (str(i), broken)) for i in range(4)]
        return run_jobs(jobs, slots, script, tmp_path / "logs", card_error=card_error)

    outcomes = run("0")
    failed = "exit code 1: CUDA out of memory"
    assert [o.error for o in outcomes] == [None, None, failed, None]
    assert sorted(asked) == ["GPU 0", "GPU 1"]
    assert sum("on 0" in o.log.read_text() for o in outcomes) == 1
    assert all("on 1" in o.log.read_text() for o in outcomes)
    left_out = "GPU 0 left out (CUDA error: unspecified launch failure); back to the queue: 0"
    assert sum(left_out in message for message in caplog.messages) == 1

    outcomes = run("01")
    assert len(outcomes) == 4
    assert all(o.error and o.error.startswith("no GPU is left that works (") for o in outcomes)
    assert all("error: no GPU is left" in o.log.read_text() for o in outcomes)


def test_a_log_keeps_older_attempts_and_shown_output_is_logged_too(tmp_path, capfdbinary):
    script = tmp_path / "script.py"
    script.write_text("import sys; print(sys.argv[1]); sys.exit(sys.argv[1] == 'bad')")
    for word in ("bad", "good"):
        (outcome,) = run_jobs(
            [Job("one", (word,))], gpu_slots(1), script, tmp_path / "logs", show=True
        )
        assert outcome.error == ("exit code 1: bad" if word == "bad" else None)
    assert outcome.log.read_text() == "bad\ngood\n"


def test_last_error_prefers_the_line_that_says_error():
    assert last_error("start\nerror: wrong key\nsome more\n") == "wrong key"
    assert last_error("error in process 1: no file\nTraceback\n") == "no file"
    assert last_error("Traceback\nKeyError: 1\n") == "KeyError: 1"
    assert last_error("") == "no output"


def test_slots_on_gpus(monkeypatch):
    monkeypatch.setattr(queue, "visible_gpus", lambda: ["4", "5", "6", "7"])
    shown = lambda slots: [slot.environment["CUDA_VISIBLE_DEVICES"] for slot in slots]  # noqa: E731
    assert shown(find_slots(None)) == ["4", "5", "6", "7"]
    assert shown(find_slots(2)) == ["4", "5"]
    assert shown(find_slots([7, 5])) == ["7", "5"]
    pairs = find_slots(None, gpus_per_job=2)
    assert shown(pairs) == ["4,5", "6,7"] and [slot.processes for slot in pairs] == [2, 2]
    for wrong, message in (
        (5, "1 to 4"),
        (0, "1 to 4"),
        ([1], "1 not visible"),
        ([4, 4], "once"),
        ([], "at least one"),
        ("all", "must be null"),
    ):
        with pytest.raises(ValueError, match=message):
            find_slots(wrong)
    with pytest.raises(ValueError, match="does not divide"):
        find_slots(3, gpus_per_job=2)


def test_several_workers_share_a_gpu_and_cpu_slots_need_none(monkeypatch):
    monkeypatch.setattr(queue, "visible_gpus", lambda: ["0", "1"])
    slots = find_slots(None, workers_per_gpu=2)
    assert [slot.environment["CUDA_VISIBLE_DEVICES"] for slot in slots] == ["0", "1", "0", "1"]
    assert len(set(slot.name for slot in slots)) == 4
    slots = find_slots(None, cpu_slots=3)
    assert [slot.environment["OMP_NUM_THREADS"] for slot in slots] == ["1"] * 3
    assert {slot.environment["CUDA_VISIBLE_DEVICES"] for slot in slots} == {""}
    with pytest.raises(ValueError, match="workers_per_gpu=2"):
        find_slots(None, gpus_per_job=2, workers_per_gpu=2)


def test_slots_without_gpus_hide_every_gpu(monkeypatch):
    monkeypatch.setattr(queue, "visible_gpus", lambda: [])
    slots = find_slots(3)
    assert len(slots) == 3
    assert all(slot.environment["CUDA_VISIBLE_DEVICES"] == "" for slot in slots)
    assert len(find_slots(None)) == 1
    with pytest.raises(ValueError, match="visible: none"):
        find_slots([0])


def test_visible_gpus_are_those_that_the_environment_leaves(monkeypatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert queue.visible_gpus() == ["0", "1"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3, GPU-7")
    assert queue.visible_gpus() == ["3", "GPU-7"]
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    assert queue.visible_gpus() == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_ends_the_running_jobs(tmp_path, number):
    child = tmp_path / "child.py"
    child.write_text(
        "import os, sys, time\nopen(sys.argv[1], 'w').write(str(os.getpid()))\ntime.sleep(60)\n"
    )
    main = tmp_path / "main.py"
    main.write_text(
        "import sys\nfrom pathlib import Path\n"
        "from hydra_plugins.gpu_queue import jobs\n"
        "jobs.GRACE = 0.2\n"
        f"names = [r'{tmp_path}/a', r'{tmp_path}/b', r'{tmp_path}/never']\n"
        "slots = [jobs.Slot('x', {}), jobs.Slot('y', {})]\n"
        "try:\n"
        f"    jobs.run_jobs([jobs.Job(n, (n,)) for n in names], slots, Path(r'{child}'),"
        f" Path(r'{tmp_path}/logs'))\n"
        "except KeyboardInterrupt:\n"
        "    sys.exit(130)\n"
    )
    process = subprocess.Popen([sys.executable, main], env=environment())
    started = [tmp_path / "a", tmp_path / "b"]
    wait_for(lambda: all(path.exists() and path.read_text() for path in started))
    process.send_signal(number)
    assert process.wait(20) == 130
    assert not (tmp_path / "never").exists()
    for path in started:
        with pytest.raises(ProcessLookupError):
            os.kill(int(path.read_text()), 0)


def test_hydra_launcher_runs_every_job_and_names_the_failed_one(tmp_path):
    done = run_app(tmp_path, "-m", "hydra/launcher=gpu_queue", "hydra.launcher.gpus=2",
                   "x=1,2,3", "fail=true")  # fmt: skip
    assert done.returncode == 1, done.stdout + done.stderr
    assert "error: 1 of 3 jobs failed" in done.stderr and "x is two" in done.stderr
    assert "Traceback" not in done.stderr
    assert (tmp_path / "out" / "x1").read_text() == ""  # no GPU to be seen
    assert (tmp_path / "out" / "x3").exists() and not (tmp_path / "out" / "x2").exists()
    logs = sorted(path.name for path in (tmp_path / "out" / "logs").iterdir())
    assert logs == [f"{i}-x={i + 1},fail=True.log" for i in range(3)]
    assert str(Path("out", "logs", logs[0])) in done.stdout


def test_slurm_through_a_stand_in(tmp_path):
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher")
    fake = write_fake_slurm(tmp_path / "bin")
    done = run_app(
        tmp_path, "-m", "hydra/launcher=submitit_slurm", "hydra.launcher.gpus_per_node=1",
        "hydra.launcher.partition=short", "hydra.launcher.array_parallelism=2", "x=1,2,3",
        path=fake,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert sorted(p.name for p in (tmp_path / "out").glob("x*")) == ["x1", "x2", "x3"]
    lines = (fake / "submitted").read_text()
    for option in ("--array=0-2%2", "--gpus-per-node=1", "--partition=short"):
        assert f"#SBATCH {option}" in lines


def write_fake_slurm(folder: Path) -> Path:
    """sbatch that runs each task of an array at once, and the srun and sacct that go with it."""
    folder.mkdir()
    (folder / "sbatch").write_text(
        "#!/usr/bin/env bash\n"
        'cp "$1" "$(dirname "$0")/submitted"\n'
        "last=$(sed -n 's/^#SBATCH --array=0-\\([0-9]*\\).*/\\1/p' \"$1\")\n"
        "id=$$\n"
        'for task in $(seq 0 "${last:-0}"); do\n'
        "  export SLURM_JOB_ID=$id SLURM_NTASKS=1 SLURM_PROCID=0 SLURM_LOCALID=0\n"
        "  export SLURM_NODEID=0 SLURM_JOB_NUM_NODES=1 SLURM_JOB_NODELIST=node\n"
        '  [ -n "$last" ] && export SLURM_ARRAY_JOB_ID=$id SLURM_ARRAY_TASK_ID=$task\n'
        # sbatch answers at once, and the id decides where the job finds its pickle.
        '  (sleep 1; bash "$1") >/dev/null 2>&1 &\n'
        "done\n"
        'echo "Submitted batch job $id"\n'
    )
    (folder / "srun").write_text(
        "#!/usr/bin/env bash\n"
        'while [ "${1#-}" != "$1" ]; do\n'
        '  case "$1" in --output|--error) shift 2;; *) shift;; esac\n'
        "done\n"
        'exec "$@"\n'
    )
    (folder / "sacct").write_text("#!/usr/bin/env bash\necho 'JobID|State|NodeList'\n")
    for path in folder.iterdir():
        path.chmod(0o755)
    return folder


def run_app(tmp_path: Path, *arguments: str, path: Path | None = None):
    (tmp_path / "app.py").write_text(APP)
    (tmp_path / "app.yaml").write_text(APP_CONFIG)
    env = environment()
    if path is not None:
        env["PATH"] = f"{path}{os.pathsep}{env['PATH']}"
    return subprocess.run(
        [sys.executable, "app.py", *arguments],
        cwd=tmp_path,
        env=env,
        capture_output=True,
        text=True,
        timeout=120,
    )


def environment() -> dict[str, str]:
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    return {**os.environ, "PYTHONPATH": path, "CUDA_VISIBLE_DEVICES": ""}


def wait_for(condition, seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "timed out"
        time.sleep(0.02)
