"""log.jsonl, and its lines for TensorBoard and Weights & Biases, which are imported only when asked for."""
import contextlib
import dataclasses
import json
import os

from configurator import ConfigError, check_file, one_line, open_to_write, write_text_atomically, writing


def open_log(path, step):
    """log.jsonl, opened to append to. Its lines of steps after `step` are cut: those steps are run again."""
    if os.path.exists(path):
        kept = []
        check_file(path)
        with open(path, errors="replace") as f:
            for line in f:
                try:
                    if not line.endswith("\n") or json.loads(line)["step"] > step:
                        break
                except (ValueError, TypeError, KeyError, RecursionError):  # cut by a crash of the machine
                    break
                kept.append(line)
        write_text_atomically(path, "".join(kept))
    return open_to_write(path, "ab")


def scalars(line):
    """{name: number} of a log line. A list with a number for each layer gives key/0, key/1 and so on."""
    flat = {}
    for key, value in line.items():
        flat |= {f"{key}/{i}": v for i, v in enumerate(value)} if isinstance(value, list) else {key: value}
    return {name: v for name, v in flat.items() if isinstance(v, (int, float))}


@contextlib.contextmanager
def open_loggers(c, step):
    """Yields a function that sends a line of log.jsonl, a dict, to each logger of Train settings `c`.

    step: the last one that an earlier start of the run leaves in the log. TensorBoard's files lie in out_dir.
    In Weights & Biases each start is a run, and a trunk is a group. Raises ConfigError where a package is
    missing or cannot start, and where the disk is full."""
    sinks = []
    with contextlib.ExitStack() as stack:
        try:
            if "tensorboard" in c.loggers:
                from torch.utils.tensorboard import SummaryWriter
                writer = SummaryWriter(os.path.join(c.out_dir, "tensorboard"), purge_step=step + 1)
                stack.callback(writing(c.out_dir)(writer.close))
                sinks.append(lambda line: [writer.add_scalar(name, value, line["step"])
                                           for name, value in scalars(line).items()])
            if "wandb" in c.loggers:
                import wandb
                run = wandb.init(project="nanoUpcycle", group=c.trunk, name=os.path.basename(c.out_dir),
                                 dir=c.out_dir, config=dataclasses.asdict(c))
                stack.callback(run.finish)
                sinks.append(lambda line: run.log(scalars(line), step=line["step"]))
        except Exception as error:  # a package is not installed, or wandb has no account
            raise ConfigError(f"--loggers={','.join(c.loggers)}: {one_line(error)}") from None
        yield writing(c.out_dir)(lambda line: [sink(line) for sink in sinks])
