"""The processes that make a study's runs, side by side: each takes one job after another and answers.

A run is made in the worker itself, or by a command such as torchrun where it is larger than a device.
"""
import contextlib
import ctypes
import functools
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import traceback
from multiprocessing.connection import wait

from configurator import HERE, ConfigError, lasting_streams, open_to_write, write_config

import torch

import pilot
from rows import differences, read_row
from start import STOP, Stopped, caught_signals
from train import train
from upcycle import upcycle


def end_with_parent():
    """On Linux this process gets SIGTERM, and saves, when its parent is killed."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG


@lasting_streams()
def worker(connection, number):
    """Run jobs from `connection` until it closes; answers (kind, value): tokens | done | failed | stopped."""
    end_with_parent()
    torch.set_num_threads(1)
    if torch.cuda.is_available():
        os.environ["LOCAL_RANK"] = str(number % torch.cuda.device_count())  # where train() looks

    def tell(kind, value=None):
        with contextlib.suppress(OSError):  # where the parent is gone, the run under way is still to be saved
            connection.send((kind, value))
    report = functools.partial(tell, "tokens")
    while True:
        try:
            job = connection.recv()
        except (EOFError, KeyboardInterrupt):
            return
        try:
            if job.upcycling and not os.path.isdir(job.upcycling.destination):
                (upcycle if job.row["family"] == "upcycled" else pilot.write_fresh)(job.upcycling)
            row = launch(job, report) if job.launcher else train(job.settings, report)
            if row:
                check_row(job, row, job.settings.out_dir)
            tell("done")
        except KeyboardInterrupt:  # Stopped, when it has saved
            tell("stopped")
            return
        except ConfigError as error:
            tell("failed", str(error))
        except Exception as error:  # the other runs go on
            tell("failed", f"{job.settings.out_dir}: {type(error).__name__}: {error}")
            traceback.print_exc()


def launch(job, report):
    """Run the job as the command `LAUNCHER train.py OUT_DIR/config.py`. Returns its row, None of a trunk.

    OUT_DIR/output.txt holds what the command prints. A signal is passed on as SIGTERM. Raises Stopped when
    the command has ended after one, and ConfigError with the error that train.py printed.
    """
    c, before = job.settings, job.tokens_done
    config, output = (os.path.join(c.out_dir, name) for name in ("config.py", "output.txt"))
    write_config(c, config)
    file = open_to_write(output, "wb")
    # torchrun kills what has not saved 30 seconds after a signal, unless it is told to wait longer.
    environment = {"TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "600"} | os.environ
    environment.pop("LOCAL_RANK", None)
    with file, caught_signals() as signals:
        signals.at_once, passed_on, status = False, False, None
        process = subprocess.Popen([*job.launcher.split(), os.path.join(HERE, "train.py"), config],
                                   stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT,
                                   env=environment, preexec_fn=end_with_parent)
        while status is None:
            if signals.caught and not passed_on:
                process.terminate()
                passed_on = True
            with contextlib.suppress(subprocess.TimeoutExpired):
                status = process.wait(timeout=0.5)
            done = job.tokens_done
            report(done - before)
            before = done
    if signals.caught:
        raise Stopped(signals.caught[0])
    if status:
        with open(output, encoding="utf-8", errors="replace") as f:
            said = re.search(r"^train\.py: (?:rank \d+: )?(?!rank \d+ failed)(.+)", f.read(), re.MULTILINE)
        raise ConfigError(said[1] if said else f"{output}: {job.launcher} ended with status {status}")
    return None if job.is_trunk else read_row(os.path.join(c.out_dir, "row.json"))


def check_row(job, row, where):
    """Raises ConfigError, naming the column, where `row`, found in the file `where`, is not the job's."""
    for key, there, planned in differences(row, job.row):
        raise ConfigError(f"{where}: {key} was {there!r}, the study now says {planned!r}; take another "
                          "--out_dir, or delete that run")


def start_workers(numbers):
    """{connection: process} of workers with these numbers. Of all signals they take SIGTERM alone."""
    context, workers = multiprocessing.get_context("spawn"), {}
    signal.pthread_sigmask(signal.SIG_BLOCK, set(STOP) - {signal.SIGTERM})  # which a child inherits
    for number in numbers:
        connection, far_end = context.Pipe()
        process = context.Process(target=worker, args=(far_end, number), daemon=True, name=str(number))
        process.start()
        far_end.close()
        workers[connection] = process
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP)
    return workers


def run_jobs(todo, count, caught, bar):
    """Run jobs on `count` workers until all are run or `caught` holds a signal. Returns what failed."""
    workers, busy, failed = start_workers(range(count)), {}, []
    try:
        while (todo or busy) and not caught:
            for connection in workers.keys() - busy.keys():
                if job := next((j for j in todo if j.needs is None or os.path.isdir(j.needs)), None):
                    todo.remove(job)
                    busy[connection] = job
                    with contextlib.suppress(OSError):  # its process has died, as recv will tell
                        connection.send(job)
            if not busy:
                return failed + [f"{j.settings.out_dir}: not run, {j.needs} was not made" for j in todo]
            for connection in wait(list(busy), timeout=0.5):
                try:
                    kind, value = connection.recv()
                except (EOFError, OSError):
                    failed.append(f"{busy.pop(connection).settings.out_dir}: its process died")
                    workers |= start_workers([int(workers.pop(connection).name)])
                    continue
                if kind == "tokens":
                    bar.update(value)
                    continue
                bar.set_postfix_str(os.path.basename(busy.pop(connection).settings.out_dir), refresh=False)
                failed += [value] if kind == "failed" else []
                caught += [signal.SIGTERM] if kind == "stopped" else []
        return failed
    finally:
        for process in workers.values() if caught else ():
            process.terminate()  # a run under way is saved
        for connection in busy:
            with contextlib.suppress(EOFError, OSError):
                while connection.recv()[0] == "tokens":
                    pass
        for connection, process in workers.items():
            connection.close()
            process.join()
