"""The command line: a flag for each field of a dataclass, and mistakes that end in one line."""

import argparse
import math
from dataclasses import dataclass, field, fields


def flag(default, help, choices=(), zero=False, below=math.inf, name="", own=None):
    """A field of a Config that is a flag of the command line, --its-name if none other is given.

    choices: the values that are allowed. Numbers must be positive, or with zero=True not negative.
    own: the default for somebody's own data, if it is another than the village's.
    """
    limits = {"help": help, "choices": choices, "zero": zero, "below": below, "name": name}
    limits["own"] = own
    return field(default=default, metadata=limits)


@dataclass
class Config:
    """What every training has."""

    seed: int = flag(0, "random seed of everything that is drawn", zero=True, below=2**63)
    out: str = flag("out", "folder for all that is written")
    device: str = flag("auto", "auto takes cuda or mps where it is found, else cpu")
    dtype: str = flag("float32", "bfloat16 autocasts the forward pass", ("float32", "bfloat16"))


# Flags of a model that train_sft.py makes itself. With --init it is there already.
PRETRAINING = set(
    "vocab_size block_size n_layer n_head n_embd pretrain_steps pretrain_lr context".split()
)

OWN = "held_out", "skip_bad", "max_bad"  # flags that only somebody's own data have
VILLAGE = "num_pairs", "eval_questions", "eval_samples"  # and only the village


def read_config(cls, script):
    """The dataclass's fields as flags of the same names; a mistake ends the run in one line."""
    names = {f.name: "--" + f.name.strip("_").replace("_", "-") for f in fields(cls)}
    names |= {f.name: f.metadata["name"] for f in fields(cls) if f.metadata["name"]}

    def refuse(message):
        if message.startswith("unrecognized arguments: --beta"):
            close = [f for f in fields(cls) if names[f.name].endswith("-beta")]
            close = (f"{names[f.name]} ({f.metadata['help']})" for f in close)
            message += "; there are " + " and ".join(close)
        raise SystemExit(f"{script}: {message}")

    parser = argparse.ArgumentParser(prog=script, allow_abbrev=False)
    parser.error = refuse
    for f in fields(cls):
        text = f.metadata["help"].replace("%", "%%")
        if f.type is bool:
            parser.add_argument(names[f.name], dest=f.name, action="store_true", help=text)
        else:
            own = f", with your own data {own}" if (own := f.metadata["own"]) else ""
            text += f" (default: {f.default}{own})" if f.default != "" else ""
            parser.add_argument(
                names[f.name], dest=f.name, type=f.type, help=text, default=argparse.SUPPRESS,
                metavar="|".join(f.metadata["choices"]) or f.type.__name__.upper(),
            )  # fmt: skip
    said = vars(parser.parse_args())
    is_own = said.get("pairs") or said.get("sft")
    for name in OWN:
        if said.get(name) and not is_own:
            refuse(f"{names[name]} is for files of your own")
    for name in VILLAGE:
        if name in said and is_own:
            print(f"{script}: {names[name]} is the village's, and not used with your own file")
    if said.get("init"):
        for name in PRETRAINING & {*said}:
            refuse(f"{names[name]} is for a model that is not there yet: --init brings its own")
    own = {f.name: f.metadata["own"] for f in fields(cls) if f.metadata["own"] is not None}
    config = cls(**(own if is_own else {}) | said)
    for f in [f for f in fields(cls) if f.name in said]:
        value, limits = getattr(config, f.name), f.metadata
        if limits["choices"] and value not in limits["choices"]:
            choices = ", ".join(limits["choices"])
            refuse(f"{names[f.name]} must be one of {choices}, not {value}")
        in_range = f.type not in (int, float) or 0 < value < limits["below"]
        if not in_range and not (limits["zero"] and value == 0):
            below = f" and below {limits['below']}" if limits["below"] < math.inf else ""
            least = "0 or more" if limits["zero"] else "positive"
            refuse(f"{names[f.name]} must be {least}{below}, not {value}")
    return config


def used(config):
    """The settings that a run has made use of, for its report."""
    settings = vars(config)
    is_own = settings.get("pairs") or settings.get("sft")
    idle = {*VILLAGE} if is_own else {*OWN, "pairs", "sft", "corpus", "max_epochs"}
    idle |= {"momentum"} if settings.get("optimizer") == "adamw" else set()
    idle |= PRETRAINING | {"corpus"} if settings.get("init") else set()
    by_data = "pretrain_steps", "steps", "lr", "epochs", "max_new_tokens"  # 0 until data are seen
    idle |= {name for name in by_data if not settings.get(name)}
    return {name: value for name, value in settings.items() if name not in idle}


def command(main, hint="the files already written are whole"):
    """Run a script; Ctrl-C, a full disk, or a model that blew up ends it in one line."""
    try:
        main()
    except KeyboardInterrupt:
        raise SystemExit(f"\ninterrupted; {hint}")
    except OSError as error:
        raise SystemExit(f"{error}; {hint}")
    except FloatingPointError as error:
        raise SystemExit(f"{error}: try a lower learning rate. What was saved before is kept")
