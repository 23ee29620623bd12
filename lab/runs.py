"""The equipment of a run, which a learner may take on trust: the device, the log, the bar, the
saved state, and how a run ends. What is trained and reported is not known here.
"""

import hashlib
import json
import os
import time

import torch
from tqdm import tqdm

import data
import model as gpt
from lab import flags
from lab.metrics import Best, at_reference

# What the bar and the screen show of a step, where a training has it; the log holds everything.
SHOWN = "loss", "rewards/margins", "rewards/accuracies", "reward", "true_reward", "kl"
# Flags that change no step, or only through the data or the start, which identity() also compares.
# A run that differs in them otherwise computes the same, and --resume takes it up.
NOT_COMPUTED = set(
    "out init device resume pairs held_out skip_bad max_bad corpus sft num_pairs "
    "max_new_tokens eval_questions eval_samples".split()
)


def prepare(config):
    """Print the config, seed torch, prove that --out can be written -> the device."""
    print("config:", *(f"{name}={v}" for name, v in flags.used(config).items() if v != ""))
    torch.manual_seed(config.seed)
    try:
        os.makedirs(config.out, exist_ok=True)
        probe = os.path.join(config.out, ".writable")
        open(probe, "w").close()
        os.remove(probe)
    except OSError as error:
        raise SystemExit(f"cannot write to --out {config.out}: {error.strerror}")
    name = config.device
    if name == "auto":
        mps = "mps" if torch.backends.mps.is_available() else "cpu"
        name = "cuda" if torch.cuda.is_available() else mps
    try:
        torch.zeros(1, device=name)
    except (RuntimeError, AssertionError):
        raise SystemExit(f"--device {name} is not available here; --device cpu is")
    return torch.device(name)


def load_checkpoint(path, device="cpu", dtype="float32"):
    """-> (model, tokenizer) from a checkpoint of ours, whichever script wrote it."""
    try:
        model, state = gpt.load(path, device)
    except FileNotFoundError:
        raise SystemExit(f"there is no {path}: train_sft.py writes sft.pt, train_dpo.py dpo.pt")
    except OSError as error:
        raise SystemExit(f"cannot read {path}: {error.strerror}")
    except ValueError as error:
        raise SystemExit(f"cannot start from {error}")
    if "tokenizer" not in state:
        raise SystemExit(f"cannot start from {path}: it has no tokenizer")
    model.autocast_bfloat16 = dtype == "bfloat16"
    return model, data.build_tokenizer(**state["tokenizer"])


def load_policy(config):
    """-> (the model to align, its tokenizer), from --init or OUT/sft.pt."""
    device = prepare(config)
    return load_checkpoint(config.init or f"{config.out}/sft.pt", device, config.dtype)


def write_json(path, value):
    """Never leaves half a file at `path`."""
    with open(f"{path}.tmp", "w") as file:
        json.dump(value, file, indent=1)
    os.replace(f"{path}.tmp", path)


def finite_grad_norm(model, loss):
    """The norm of the gradient, to log. Raises FloatingPointError where it or the loss is not
    finite, so that no such step is taken."""
    grad_norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters()])
    if not (loss + grad_norm).isfinite():
        raise FloatingPointError(f"loss {loss.item()}, norm of its gradient {grad_norm.item()}")
    return grad_norm


def average(recent, names):
    """The means of some metrics over some steps, as text. What was not measured is left out."""
    names = [name for name in names if name in recent[0]]
    means = [sum(metrics[name] for metrics in recent) / len(recent) for name in names]
    return "  ".join(f"{name} {mean:.3f}" for name, mean in zip(names, means))


def shown(metrics):
    """Their names, without standard errors, which the log and the report have."""
    return [name for name in metrics if not name.endswith("_se")]


def identity(config, **parts):
    """What a resumed run must share with the interrupted one: settings, and parts such as data."""
    settings = {name: v for name, v in vars(config).items() if name not in NOT_COMPUTED}
    digests = {k: hashlib.sha256(repr(v).encode()).hexdigest()[:16] for k, v in parts.items()}
    return settings | digests


class Run:
    """One training's folder, log, bar, saved state and seconds.

    Writes OUT/NAME.jsonl (a line of metrics for each step), OUT/NAME.pt and OUT/NAME.json (the
    report); while it runs, the model so far and what --resume needs in OUT/NAME.part.pt.
    """

    last_lap = time.perf_counter()  # one clock for all trainings of a process

    def __init__(self, name, config):
        self.name, self.config, self.path = name, config, f"{config.out}/{name}"
        self.step, self.seconds, self.best = 0, {}, Best()
        if os.path.exists(f"{self.path}.jsonl"):
            with open(f"{self.path}.jsonl", "rb") as file:
                begins = file.read(8)
            if begins not in (b"", b'{"step":'):
                lost = f"{self.path}.jsonl is no log, and one would be written over it"
                raise SystemExit(f"{lost}: move it, or give another --out")

    def lap(self, stage):
        """Note how long a stage took: all the time since the stage before it."""
        now = time.perf_counter()
        self.seconds[stage], Run.last_lap = round(now - Run.last_lap, 1), now

    def attach(self, model, tokenizer, optimizer=None, **parts):
        """Say what to save. parts: what besides the settings tells this run from others, such as
        its data; of them only digests are saved."""
        self.model, self.optimizer = model, optimizer
        run = identity(self.config, **parts)
        self.kept = {"tokenizer": data.tokenizer_state(tokenizer), "run": run}

    def track(self, training, steps, saves=10):
        """Yield what `training` yields, the metrics of each of its `steps` steps but the first
        self.step, with a bar, and save the model at the end. The caller hands each to log()."""
        self.lap("preparing")
        if os.path.exists(f"{self.path}.json"):
            os.remove(f"{self.path}.json")  # the report of another run
        self.steps, self.saves = steps, saves
        self.bar = tqdm(total=steps, initial=self.step, desc=self.name, leave=False, disable=None)
        with open(f"{self.path}.jsonl", "a+", buffering=1) as self.file, self.bar:
            self.recent = self.cut_log()
            try:
                for found in training:
                    yield found
                    if self.best.worse_since >= self.best.patience:
                        self.bar.write(f"{self.name} stops here: the held-out loss falls no more")
                        break
            except FloatingPointError as error:
                raise FloatingPointError(f"after step {self.step}: {error}")
        print(f"mean of the last {len(self.recent)} steps:", average(self.recent, SHOWN))
        self.best.take(self.model, self.name, self.step)
        self.save(f"{self.path}.pt")
        self.lap("training")

    def measure_start(self, measure):
        """Show what measure() finds before the first step, and begin to keep the best weights."""
        if not self.step:
            found = measure()
            self.best.note(self.model, 0, found)
            self.best.start = at_reference(found)
            print("before the first step:", average([self.best.start], shown(self.best.start)))

    def log(self, found, measure=dict):
        """Write a step's line of NAME.jsonl. self.saves times in a run, add to it what measure()
        finds after the step, and then save the state: the log holds every step that is saved."""
        self.step += 1
        self.recent = [*self.recent[-49:], found]
        means = average(self.recent, SHOWN)
        self.bar.set_postfix_str(means, refresh=False)
        self.bar.update()
        saved, due = ((step * self.saves) // self.steps for step in (self.step - 1, self.step))
        measured = measure() if due > saved else {}
        self.file.write(json.dumps({"step": self.step, **found, **measured}) + "\n")
        if due > saved:
            self.best.note(self.model, self.step, measured)
            now = "; now: " + average([measured], shown(measured)) if measured else ""
            count = len(self.recent)
            self.bar.write(f"step {self.step}/{self.steps}, mean of last {count}: {means}{now}")
            self.save(f"{self.path}.part.pt", step=self.step, best=vars(self.best))

    def cut_log(self):
        """Cut the log after the steps that are done -> its last lines."""
        self.file.seek(0)
        lines = [self.file.readline() for _ in range(self.step)]
        if not all(line.endswith("\n") for line in lines):
            raise SystemExit(f"--resume: {self.path}.jsonl has fewer lines than {self.step} steps")
        self.file.truncate(self.file.tell())
        return [json.loads(line) for line in lines[-50:]]

    def save(self, path, **state):
        if state and self.optimizer:
            state["optimizer"] = self.optimizer.state_dict()
        gpt.save(path, self.model, **self.kept, **state)

    def finish(self, report):
        """Write the report, and remove what only an interrupted run needs."""
        self.lap("measuring")
        end = {"seconds": self.seconds, "config": flags.used(self.config), "seed": self.config.seed}
        write_json(f"{self.path}.json", self.best.report(self.step, report) | end)
        os.remove(f"{self.path}.part.pt")
        print(f"wrote {self.name}.pt, .jsonl, .json to {self.config.out}/; seconds: {self.seconds}")


def find_state(paths, run, device):
    """The first of these checkpoints that was written by this run -> (path, its dict)."""
    found = f"there is no {' or '.join(paths)}"
    for path in filter(os.path.exists, paths):
        try:
            _, state = gpt.load(path, device)
        except (OSError, ValueError) as error:
            raise SystemExit(f"--resume: {error}")
        was = state.get("run", {})
        other = [name for name in run if was.get(name) != run[name]]
        if not other:
            return path, state
        change = f"{other[0]} was {was.get(other[0], 'not noted')}, is {run[other[0]]}"
        found = f"{path} is of another run: {change}"
    raise SystemExit(f"--resume: {found}. Without the flag, a run starts from the beginning")


def resume(*trainings):
    """Of the trainings of a script, in their order, the one to start with: the first, or with
    --resume the one that was interrupted. That one takes up the state that it has saved."""
    if not trainings[0].config.resume:
        return trainings[0]
    latest = trainings[::-1]
    found = {f"{run.path}{end}": run for end in (".part.pt", ".pt") for run in latest}
    device = latest[0].model.wte.weight.device
    path, state = find_state(found, latest[0].kept["run"], device)
    if path == f"{latest[0].path}.pt":
        raise SystemExit(f"--resume: {path} is of this very run, and finished")
    run = found[path]
    run.model.load_state_dict(state["weights"])
    print(f"resumed from {path}, step {state.get('step', 'the last')}")
    if path == f"{run.path}.pt":  # this one is finished: the next one is due
        return trainings[trainings.index(run) + 1]
    run.optimizer.load_state_dict(state["optimizer"])
    run.step = state["step"]
    vars(run.best).update(state.get("best", {}))
    return run
