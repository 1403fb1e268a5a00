"""Faults on purpose: kills, failing disks, lost ranks, signals, second writers, files of strangers.

    python tests/chaos.py MODE [TRIALS] [SEED]

MODE: kill, io, signals, ranks, sweep, upcycle, rows, files; or short, which is a little of all but sweep.
A trial breaks something, goes on as a user would, and compares with what an undisturbed run gives. Each mode
prints its trials and how many lost something, printed a traceback, hung, or left a temporary file. Processes
are forks of this one, which has torch loaded. A library in C, loaded before all others, counts the system
calls that change a directory; at the one it is told it kills the process or lets the call fail.
"""
import ctypes
import dataclasses
import errno
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
STEP, STEPS = 128, 20


def loaded_shim():
    """The fault library, loaded into this process before all others: the script starts itself anew for it."""
    if "CHAOS_SHIM" not in os.environ:
        folder = tempfile.mkdtemp(prefix="chaos-")
        source, path = Path(__file__).with_suffix(".c"), os.path.join(folder, "shim.so")
        subprocess.run(["cc", "-shared", "-fPIC", "-O1", "-w", source, "-o", path, "-ldl"], check=True)
        os.environ |= {"CHAOS_SHIM": folder, "LD_PRELOAD": path, "OMP_NUM_THREADS": "1"}
        os.execv(sys.executable, [sys.executable, *sys.argv])
    os.environ.pop("LD_PRELOAD")
    return ctypes.CDLL(os.path.join(os.environ["CHAOS_SHIM"], "shim.so"))


@dataclasses.dataclass
class Count:
    """What a mode found."""
    trials: int = 0
    lost: int = 0
    tracebacks: int = 0
    hangs: int = 0
    leftovers: int = 0

    def say(self, kind, text):
        setattr(self, kind, getattr(self, kind) + 1)
        if self.lost + self.tracebacks + self.hangs + self.leftovers <= 8:
            print(f"  {kind}: {text[-1500:]}", flush=True)


class Process:
    """A fork of this process in which `action` runs, with its output in files."""

    def __init__(self, action, at=0, error=0, root="", **environment):
        self.out, self.err = (tempfile.TemporaryFile() for _ in range(2))
        self.began, self.pid = time.monotonic(), os.fork()
        if not self.pid:
            status = 1
            try:
                for number in (signal.SIGINT, signal.SIGHUP, signal.SIGTERM, signal.SIGUSR1):
                    signal.signal(number, signal.default_int_handler if number == 2 else signal.SIG_DFL)
                os.environ |= environment
                os.dup2(self.out.fileno(), 1), os.dup2(self.err.fileno(), 2)
                shim.fault_arm(str(root).encode(), at, error)
                action()
                status = 0
            except SystemExit as stop:
                status = stop.code
            except KeyboardInterrupt:  # a signal before the script has begun
                status = 130
            except BaseException:
                traceback.print_exc()
            sys.stdout.flush(), sys.stderr.flush()
            os._exit(status or 0)

    def end(self, count, timeout=60):
        """(exit status, what it wrote to stderr). A process that does not end is counted and killed."""
        while not (found := os.waitpid(self.pid, os.WNOHANG))[0]:
            if time.monotonic() > self.began + timeout:
                count.say("hangs", f"{timeout} s")
                os.kill(self.pid, signal.SIGKILL)
                timeout = 1e9
            time.sleep(0.01)
        self.err.seek(0)
        text = self.err.read().decode(errors="replace")
        if "Traceback" in text:
            count.say("tracebacks", text)
        return os.waitstatus_to_exitcode(found[1]), text


def script(main, cls, *argv):
    """An action: what a script does with this command line."""
    def action():
        sys.argv = ["script.py", *argv]
        configurator.run(main, cls)
    return action


# ---------------------------------------------------------------------------------------------------------
# Runs of train.py

class World:
    """A data set, sources to start from, and what undisturbed runs of all kinds give."""

    def __init__(self, folder):
        self.folder, self.made = Path(folder), 0
        text = self.folder / "text"
        text.mkdir()
        parts = "\n\n".join(path.read_text() for path in sorted(ROOT.glob("*.py"))).split("\n\n")
        for i, part in enumerate(parts):
            (text / f"{i}.txt").write_text(part)
        self.data = str(self.folder / "data")
        self.check(Process(script(prepare.main, prepare.Options, str(text), f"--out_dir={self.data}",
                                  "--val_fraction=0.1")))
        base = train.Train(dataset=self.data, hidden_size=16, intermediate_size=32,
                           num_hidden_layers=2, num_attention_heads=2, max_seq_len=16, tokens_per_step=STEP,
                           max_tokens=STEPS * STEP, warmup_steps=3, decay_steps=6, decay_start=14,
                           eval_tokens=1024, save_every_seconds=0, eval_every_steps=7, trunk="t",
                           save_at_tokens=[6 * STEP, 12 * STEP])
        dense = dataclasses.replace(base, decay_steps=0, decay_start=0, rows=None,
                                    out_dir=str(self.folder / "dense"))
        self.check(self.training(dense))
        self.dense = f"{dense.out_dir}/checkpoint-6"
        start = str(self.folder / "start")
        self.check(Process(lambda: upcycle.upcycle(upcycle.Options(
            source=self.dense, destination=start, num_local_experts=4, check=False))))
        self.kinds = {"dense": base,
                      "moe": dataclasses.replace(base, num_local_experts=4, router_bias_update_rate=0.01),
                      "branch": dataclasses.replace(base, init_from=self.dense, branch=True),
                      "upcycled": dataclasses.replace(base, init_from=start, num_local_experts=4)}
        self.reference, self.events = {}, {}
        for kind in self.kinds:
            c = self.fresh(kind)
            seen = self.folder / "seen"
            self.check(self.training(c, then=lambda: seen.write_text(str(shim.fault_seen()))))
            self.reference[kind], self.events[kind] = self.result(c), int(seen.read_text())

    def check(self, process):
        status, text = process.end(Count())
        assert status == 0, text

    process = staticmethod(Process)

    def fresh(self, kind):
        self.made += 1
        folder = self.folder / f"trial{self.made}"
        return dataclasses.replace(self.kinds[kind], out_dir=str(folder / "run"),
                                   rows=str(folder / "rows.jsonl"))

    def training(self, c, at=0, error=0, then=lambda: None, root=None, **environment):
        """A process that trains the settings `c`, by the command. Faults come under `root`."""
        folder = Path(c.out_dir).parent
        folder.mkdir(exist_ok=True)
        configurator.write_config(c, folder / "c.py")
        action = script(train.main, train.Train, str(folder / "c.py"))
        return Process(lambda: (action(), then()), at, error, root or folder, **environment)

    def result(self, c):
        """What a run leaves: the bytes of its checkpoints, its row, its steps."""
        files = {p.relative_to(c.out_dir).as_posix(): p.read_bytes()
                 for p in Path(c.out_dir).glob("check*/*.*")}
        rows = [json.loads(line) for line in open(c.rows)]
        steps = [json.loads(line)["step"] for line in open(os.path.join(c.out_dir, "log.jsonl"))]
        return files, [{k: v for k, v in row.items() if k not in ("config", "git")} for row in rows], steps

    def recovered(self, kind, c, count, what):
        """Go on with a disturbed run and compare it with the undisturbed one. Then its directory goes."""
        status, text = self.training(dataclasses.replace(c, resume=True)).end(count)
        try:
            if status or self.result(c) != self.reference[kind]:
                count.say("lost", f"{kind}, {what}: status {status} {text}")
        except (OSError, ValueError) as error:
            count.say("lost", f"{kind}, {what}: {error!r} {text}")
        left = [str(p) for p in Path(c.out_dir).parent.rglob("*") if p.name.endswith(".tmp")]
        if left:
            count.say("leftovers", f"{kind}, {what}: {left}")
        count.trials += 1
        shutil.rmtree(Path(c.out_dir).parent, ignore_errors=True)


def one_temporary(c, count, what):
    """Count a directory with more than one unfinished temporary."""
    left = [p.name for p in Path(c.out_dir).glob(".checkpoint*")]
    if len(left) > 1:
        count.say("leftovers", f"{what}: {left} at a time")


class Events:
    """next() gives a kind of run, the number of an event in it and an error: in random order, and all of
    them before one comes again."""

    def __init__(self, world, rng, *errors):
        self.all = [(kind, at, error) for kind, number in world.events.items()
                    for at in range(1, number + 1) for error in errors]
        self.rng, self.left, self.tried = rng, [], 0

    def next(self):
        self.left = self.left or self.rng.sample(self.all, len(self.all))
        self.tried += 1
        return self.left.pop()

    def say(self):
        print(f"  {self.tried} trials in turn at {len(self.all)} events", flush=True)


def kill(world, trials, rng, count):
    """SIGKILL at each change of the directory in turn (70 %), at one of a save, or at any other moment. What
    was killed elsewhere than in turn may have been stopped before, or is killed again before the end."""
    events = Events(world, rng, 0)
    for i in range(trials):
        in_turn, kind, number, what = rng.random() < 0.7, list(world.kinds)[i % 4], 0, ""
        if in_turn:
            kind, number, _ = events.next()
        c = world.fresh(kind)
        if not in_turn and i % 3 == 2:  # leaves a checkpoint that is only for the resume
            process = world.training(c)
            time.sleep(rng.uniform(0, 0.3))
            os.kill(process.pid, signal.SIGTERM)
            process.end(count)
        for again in range(1 + (i % 5 == 4)):
            root, at = Path(c.out_dir).parent, number  # 0: any time
            if again or not in_turn and rng.random() < 0.5:
                root, at = Path(c.out_dir) / ".checkpoint", rng.randint(1, 24)  # a save's temporary
            process = world.training(dataclasses.replace(c, resume=True), at=at, root=root)
            if not at:
                time.sleep(rng.uniform(0, 0.4))
                os.kill(process.pid, signal.SIGKILL)
            process.end(count)
            what += f" killed at {at or 'random'} of {root.name}"
            one_temporary(c, count, what)
        world.recovered(kind, c, count, what)
    events.say()


def io(world, trials, rng, count):
    """ENOSPC from one change of the directory on, or EIO at one: a line that says so, and nothing is lost.
    Each change of the directory comes in its turn."""
    events = Events(world, rng, errno.ENOSPC, errno.EIO)
    for _ in range(trials):
        kind, at, error = events.next()
        c = world.fresh(kind)
        status, text = world.training(c, at, error).end(count)
        lines = [line for line in text.splitlines() if line.startswith("script.py: ")]
        if status not in (0, 2) or status == 2 and (len(lines) != 1 or error == errno.ENOSPC
                                                    and "the disk is full: " not in lines[0]):
            count.say("lost", f"{kind}, {errno.errorcode[error]} at {at}: status {status}: {text}")
        if status == 0 and error == errno.ENOSPC:
            count.say("lost", f"{kind}: a full disk at {at} went unnoticed")
        world.recovered(kind, c, count, f"{errno.errorcode[error]} at {at}")
    events.say()


def signals(world, trials, rng, count):
    """Each signal at random moments, set-up and the last validation included; some come twice or thrice. In
    half of the trials the second one follows soon, is not taken for the first, and ends the process."""
    numbers, ended = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1), 0
    for i in range(trials):
        kind = rng.choice(list(world.kinds))
        c, number, what = world.fresh(kind), numbers[i % 4], ""
        at_once = (i + i // 4) % 2
        start.ONE_SENDING = 0.0 if at_once else 2.0
        process = world.training(c)
        for again in range(rng.randint(1 + at_once, 3)):
            time.sleep(rng.uniform(0, 0.02 if again and at_once else 0.25))
            os.kill(process.pid, number)
            what += f" {number.name}"
        status, text = process.end(count, timeout=10)
        if status not in (0, 128 + number, -number):
            count.say("lost", f"{what}: status {status}: {text}")
        ended += status == -number and bool(at_once)
        world.recovered(kind, c, count, what)
    print(f"  {ended} were ended by a second signal at once", flush=True)


def ranks(world, trials, rng, count):
    """Two processes train; one of them is killed, or both, or both get SIGTERM. One process then goes on."""
    for i in range(trials):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        c, how = world.fresh(("dense", "moe")[i % 2]), ("rank 0", "rank 1", "both", "SIGTERM")[i // 2 % 4]
        c = dataclasses.replace(c, max_tokens=400 * STEP, rows=None,
                                parallel=("fsdp", "ddp")[(i + i // 8) % 2],
                                save_at_tokens=[k * 10 * STEP for k in range(1, 40)])
        pair = [world.training(c, RANK=str(r), LOCAL_RANK=str(r), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1",
                               MASTER_PORT=port) for r in range(2)]
        while not os.path.exists(f"{c.out_dir}/checkpoint-10") and time.monotonic() < pair[0].began + 60:
            time.sleep(0.01)
        time.sleep(rng.uniform(0, 0.4))
        for process in {"rank 0": pair[:1], "rank 1": pair[1:]}.get(how, pair):
            os.kill(process.pid, signal.SIGTERM if how == "SIGTERM" else signal.SIGKILL)
        ends = [process.end(count) for process in pair]
        said = "".join(text for _, text in ends).count("another rank has gone")
        stopped = {status for status, _ in ends} <= {0, 143}
        if how == "SIGTERM" and not stopped or how.startswith("rank") and said != 1:
            count.say("lost", f"{how}: {ends}")
        saved = checkpoint.checkpoints(c.out_dir)
        c = dataclasses.replace(c, max_tokens=(saved[-1][0] + 2) * STEP, resume=True, decay_start=None)
        status, text = world.training(c).end(count)
        if status or checkpoint.checkpoints(c.out_dir)[-1][0] != saved[-1][0] + 2:
            count.say("lost", f"{how}: resumed with status {status}: {text}")
        if left := list(Path(c.out_dir).glob(".*.tmp")):
            count.say("leftovers", f"{how}: {left}")
        count.trials += 1
        shutil.rmtree(Path(c.out_dir).parent)


# ---------------------------------------------------------------------------------------------------------
# Upcycling, rows, studies

def digest(folder):
    return {p.name: p.read_bytes() for p in Path(folder).iterdir()
            if p.name not in ("upcycle.json", "trainer_state.json", "README.md")}  # they name the directory


def upcycling(world, trials, rng, count):
    """upcycle.py is killed at each change of the directory, or three of them write to one destination."""
    folder = world.folder / "upcycling"
    folder.mkdir(exist_ok=True)

    def process(at=0):
        return Process(script(upcycle.main, upcycle.Options, world.dense, str(folder / "moe"),
                              "--num_local_experts=4", "--check=false"), at, 0, folder)
    for i in range(trials):
        together = [process() for _ in range(3)] if i % 3 == 2 else [process(i % 40 + 1)]
        ends = [p.end(count) for p in together]
        if len(together) == 3 and sorted(status for status, _ in ends) != [0, 2, 2]:
            count.say("lost", f"three at once: {ends}")
        if not (folder / "moe").exists():
            process().end(count)
        if not (folder / "moe").exists() or digest(folder / "moe") != digest(world.folder / "start"):
            count.say("lost", f"{ends}")
        if len(os.listdir(folder)) > 1:
            count.say("leftovers", str(os.listdir(folder)))
        count.trials += 1
        shutil.rmtree(folder / "moe", ignore_errors=True)


def rows(world, trials, rng, count):
    """Six processes append rows to one file, three of them killed in a write. The killed ones come again."""
    from rows import append_row
    path = world.folder / "rows_of_many.jsonl"

    def process(name, at=0):
        return Process(lambda: [append_row(str(path), {"family": "dense", "N": name, "D": i, "loss": 2.5})
                                for i in range(1, 6)], at, 0, path)
    for i in range(trials):
        for process_ in [process(1 + n, (i + n) % 15 + 1 if n < 3 else 0) for n in range(6)]:
            process_.end(count)
        for process_ in [process(1 + n) for n in range(3)]:
            process_.end(count)
        found = sorted(line for line in path.read_text().splitlines())
        wanted = sorted(json.dumps({"family": "dense", "N": n, "D": d, "loss": 2.5})
                        for n in range(1, 7) for d in range(1, 6))
        if found != wanted:
            count.say("lost", f"{len(found)} rows: {set(wanted) ^ set(found)}")
        count.trials += 1
        path.unlink()


STUDY = """
_step = 128
sizes = [{"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1}]
D1 = [10 * _step, 40 * _step]
D2 = [10 * _step, 20 * _step]
num_local_experts = 4
workers = 2
train = {"dataset": "DATA", "tokens_per_step": _step, "max_seq_len": 16, "warmup_steps": 3,
         "eval_tokens": 1024}
"""


def studies(world, trials, rng, count):
    """A study whose sweep, or one of whose workers, is killed or stopped. The same command goes on."""
    config = world.folder / "study.py"
    config.write_text(STUDY.replace("DATA", str(world.folder / "data")))

    def run(out, *numbers):
        process = subprocess.Popen([sys.executable, "sweep.py", str(config), f"--out_dir={out}"], cwd=ROOT,
                                   stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        for number in numbers:
            time.sleep(rng.uniform(0, 9))
            children = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True)
            victims = [int(pid) for pid in children.stdout.split()]
            victim = rng.choice(victims[-2:]) if victims and rng.random() < 0.4 else process.pid
            try:
                os.kill(victim, number)
            except ProcessLookupError:
                pass
        text = process.communicate(timeout=180)[0]
        if "Traceback" in text:
            count.say("tracebacks", text)
        return process.returncode, text

    def result(out):
        found = [json.loads(line) for line in open(out / "rows.jsonl")]
        return sorted(json.dumps({k: v for k, v in row.items() if k not in ("config", "git")})
                      for row in found)
    assert run(world.folder / "study")[0] == 0
    for i in range(trials):
        out = world.folder / f"study{i}"
        for number in rng.choices([signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGHUP], k=2):
            run(out, number)
        status, text = run(out)
        if status or result(out) != result(world.folder / "study"):
            count.say("lost", f"status {status}: {text}")
        if left := [str(p) for p in out.rglob("*.tmp")]:
            count.say("leftovers", str(left))
        count.trials += 1
        shutil.rmtree(out)


SHORT = {"kill": 12, "io": 8, "signals": 4, "ranks": 2, "upcycle": 6, "rows": 3, "files": 400}


def main(mode="short", trials=100, seed=0):
    modes, failed = {"kill": kill, "io": io, "signals": signals, "ranks": ranks, "sweep": studies,
                     "upcycle": upcycling, "rows": rows, "files": files}, 0
    with tempfile.TemporaryDirectory() as folder:
        world = World(folder)
        for name, number in SHORT.items() if mode == "short" else [(mode, int(trials))]:
            count, began = Count(), time.monotonic()
            modes[name](world, number, random.Random(int(seed)), count)
            print(f"{name}: {count.trials} trials, {count.lost} lost, {count.tracebacks} tracebacks, "
                  f"{count.hangs} hangs, {count.leftovers} leftovers, {time.monotonic() - began:.0f} s",
                  flush=True)
            failed += count.lost + count.tracebacks + count.hangs + count.leftovers
    raise SystemExit(failed > 0)


if __name__ == "__main__":
    shim = loaded_shim()
    sys.path.insert(0, str(ROOT))
    import configurator
    import checkpoint
    import start
    import train
    import upcycle
    from data import prepare
    from mutate import files
    train.code_version = lambda: None  # git would lock the repository
    main(*sys.argv[1:])
