"""log.jsonl, and its lines for TensorBoard and Weights & Biases, which are imported only when asked for."""
import contextlib
import dataclasses
import importlib
import json
import os

from configurator import ConfigError, write_text_atomically, writing


def open_log(path, step):
    """log.jsonl, opened to append to. Its lines of steps after `step` are cut: those steps are run again."""
    if os.path.exists(path):
        kept = []
        with open(path, errors="replace") as f:
            for line in f:
                try:
                    if not line.endswith("\n") or json.loads(line)["step"] > step:
                        break
                except (ValueError, TypeError, KeyError):  # cut by a crash of the machine
                    break
                kept.append(line)
        write_text_atomically(path, "".join(kept))
    with writing(path):
        return open(path, "ab", buffering=0)


def scalars(line):
    """{name: number} of a log line. A list with a number for each layer gives key/0, key/1 and so on."""
    found = {}
    for key, value in line.items():
        items = value if isinstance(value, list) else [value]
        names = [f"{key}/{i}" for i in range(len(items))] if items is value else [key]
        found |= {name: item for name, item in zip(names, items) if isinstance(item, (int, float))}
    return found


def need(module):
    """A module of an optional package, which has its last name. Raises ConfigError where there is none."""
    try:
        return importlib.import_module(module)
    except ImportError:
        name = module.split(".")[-1]
        raise ConfigError(f"--loggers: the package {name} is missing; pip install {name}") from None


@contextlib.contextmanager
def open_loggers(c, step):
    """Yields a function that sends a line of log.jsonl, a dict, to each of c.loggers.

    c: Train settings. step: the last one that an earlier start of the run leaves in the log. TensorBoard's
    files lie in out_dir/tensorboard. In Weights & Biases each start is a run, and the runs of a trunk are a
    group. Raises ConfigError where a package is missing or Weights & Biases cannot start.
    """
    sinks = []
    with contextlib.ExitStack() as stack:
        if "tensorboard" in c.loggers:
            writer = need("torch.utils.tensorboard").SummaryWriter(os.path.join(c.out_dir, "tensorboard"),
                                                                   purge_step=step + 1 if step > 0 else None)
            stack.callback(writer.close)
            sinks.append(lambda line: [writer.add_scalar(name, value, line["step"])
                                       for name, value in scalars(line).items()])
        if "wandb" in c.loggers:
            wandb = need("wandb")
            try:
                run = wandb.init(project="nanoUpcycle", group=c.trunk, name=os.path.basename(c.out_dir),
                                 dir=c.out_dir, config=dataclasses.asdict(c))
            except wandb.Error as error:
                raise ConfigError(f"--loggers: wandb: {str(error).splitlines()[0]}; "
                                  "WANDB_MODE=offline needs no account") from None
            stack.callback(run.finish)
            sinks.append(lambda line: run.log(scalars(line), step=line["step"]))
        yield lambda line: [sink(line) for sink in sinks]
