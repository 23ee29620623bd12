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

# Flags that say where files lie or how a policy is measured. A run that differs in them only
# computes the same, and --resume takes it up.
NOT_COMPUTED = set(
    "out init device resume pairs skip_bad corpus sft num_pairs max_new_tokens "
    "eval_questions eval_samples".split()
)


def prepare(config):
    """Print the config, seed torch, prove that --out can be written -> the device."""
    print("config:", *(f"{name}={value}" for name, value in vars(config).items() if value != ""))
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
    model.bfloat16 = dtype == "bfloat16"
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


def average(recent, names):
    """The means of some metrics over some steps, as text."""
    means = {name: sum(metrics[name] for metrics in recent) / len(recent) for name in names}
    return "  ".join(f"{name} {mean:.3f}" for name, mean in means.items())


def finite_grad_norm(model, loss, flag="--lr"):
    """The norm of the gradient, to log. Raises FloatingPointError where it or the loss is not
    finite, so that no such step is taken."""
    grad_norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters()])
    if not (loss + grad_norm).isfinite():
        found = f"loss {loss.item()}, norm of its gradient {grad_norm.item()}"
        raise FloatingPointError(f"{found}: try a smaller {flag}")
    return grad_norm


def check_first_loss(loss, expected, config):
    """Refuse a policy that is not the reference before its first step: their losses would differ.

    loss: of the policy's log-probabilities. expected: of the reference's own, in their place.
    """
    # Both have been computed in other batches, so the last bits differ, in bfloat16 the second.
    tolerance = max(1, config.beta) * (1e-3 if config.dtype == "float32" else 5e-2)
    if not abs(loss - expected) <= tolerance * max(1, abs(expected)):
        raise SystemExit(f"loss at step 0 is {loss:.4f}, not {expected:.4f}: policy ≠ reference")
    print(f"loss at step 0: {loss:.4f}; of the reference's own log-probabilities: {expected:.4f}")


def weight_sums(model):
    """What tells a model from another: for each of its weights the sum."""
    return [weights.double().sum().item() for weights in model.state_dict().values()]


def identity(config, **parts):
    """What a resumed run must share with the interrupted one: settings, and parts such as data."""
    settings = {name: v for name, v in vars(config).items() if name not in NOT_COMPUTED}
    digests = {k: hashlib.sha256(repr(v).encode()).hexdigest()[:16] for k, v in parts.items()}
    return settings | digests


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


class Run:
    """One training's folder, log, bar, saved state and seconds.

    Writes OUT/NAME.jsonl (a line of metrics a step), OUT/NAME.pt and OUT/NAME.json (the report);
    while it runs, the model so far and what --resume needs in OUT/NAME.part.pt.
    """

    last_lap = time.perf_counter()  # one clock for all trainings of a process

    def __init__(self, name, config):
        self.name, self.config, self.path = name, config, f"{config.out}/{name}"
        self.step, self.seconds = 0, {}

    def lap(self, stage):
        """Note how long a stage took: all the time since the stage before it."""
        now = time.perf_counter()
        self.seconds[stage], Run.last_lap = round(now - Run.last_lap, 1), now

    def keep(self, model, tokenizer, optimizer=None, **parts):
        """Say what is to be saved. parts: what the settings do not say of this run, as its data."""
        self.model, self.optimizer = model, optimizer
        run = identity(self.config, **parts)
        self.kept = {"tokenizer": data.tokenizer_state(tokenizer), "run": run}

    def resume(self, *earlier):
        """With --resume, take up what was saved of this training, or of those that come before it
        -> the one to go on with; without the flag the first of all."""
        trainings = self, *earlier
        if not self.config.resume:
            return trainings[-1]
        found = {f"{run.path}{end}": run for end in (".part.pt", ".pt") for run in trainings}
        device = self.model.wte.weight.device
        path, state = find_state(found, self.kept["run"], device)
        if path == f"{self.path}.pt":
            raise SystemExit(f"--resume: {path} is of this very run, and finished")
        run = found[path]
        run.model.load_state_dict(state["weights"])
        print(f"resumed from {path}, step {state.get('step', 'the last')}")
        if path == f"{run.path}.pt":  # finished: what comes after it is due
            return trainings[trainings.index(run) - 1]
        run.optimizer.load_state_dict(state["optimizer"])
        run.step = state["step"]
        return run

    def track(self, training, steps, shown=("loss",)):
        """Take a training to its end, and yield the metrics of ten of its steps on the way.

        training yields the metrics of each of `steps` steps, but for the first self.step. What the
        caller adds to those that are yielded here goes into the log with them. The state is saved
        after that, so that the log holds every step that is saved.
        """
        if os.path.exists(f"{self.path}.json"):
            os.remove(f"{self.path}.json")  # the report of another run
        bar = tqdm(total=steps, initial=self.step, desc=self.name, leave=False, disable=None)
        with open(f"{self.path}.jsonl", "a+", buffering=1) as log, bar:
            recent = self.cut_log(log)
            try:
                for metrics in training:
                    self.step += 1
                    recent, names = [*recent[-49:], metrics], {*metrics}
                    bar.set_postfix_str(average(recent, shown), refresh=False)
                    bar.update()
                    is_tenth = self.step * 10 // steps > (self.step - 1) * 10 // steps
                    if is_tenth:
                        yield metrics
                        added = [name for name in metrics if name not in names]
                        line = f"{average(recent, shown)}  {average([metrics], added)}".rstrip()
                        bar.write(f"step {self.step:4}/{steps}  {line}")
                    log.write(json.dumps({"step": self.step, **metrics}) + "\n")
                    if is_tenth:
                        self.save(f"{self.path}.part.pt", step=self.step)
            except FloatingPointError as error:
                raise SystemExit(f"after step {self.step}: {error}. What was saved before is kept")
        self.save(f"{self.path}.pt")
        print(f"last {len(recent)} steps:", average(recent, shown))
        self.lap("training")

    def cut_log(self, log):
        """Leave only the lines of the steps behind us in the open file -> the last of them."""
        log.seek(0)
        lines = [log.readline() for _ in range(self.step)]
        if not all(line.endswith("\n") for line in lines):
            raise SystemExit(f"--resume: {log.name} has fewer lines than {self.step}, the steps")
        log.truncate(log.tell())
        return [json.loads(line) for line in lines[-50:]]

    def save(self, path, **state):
        if state and self.optimizer:
            state["optimizer"] = self.optimizer.state_dict()
        gpt.save(path, self.model, **self.kept, **state)

    def finish(self, report):
        """Write the report, and remove what only an interrupted run needs."""
        self.lap("measuring")
        end = {"seconds": self.seconds, "config": vars(self.config), "seed": self.config.seed}
        write_json(f"{self.path}.json", report | end)
        os.remove(f"{self.path}.part.pt")
        print(f"wrote {self.name}.pt, .jsonl and .json to {self.config.out}/: {self.seconds}")
