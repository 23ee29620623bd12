"""Numbers of a run: what is shown of them, means and their errors, the best weights by them."""

import math

# What the bar and the screen show of a step, where a training has it; the log holds everything.
SHOWN = "loss", "rewards/margins", "rewards/accuracies", "reward", "true_reward", "kl"


def average(recent, names):
    """The means of some metrics over some steps, as text. What was not measured is left out."""
    names = [name for name in names if name in recent[0]]
    means = [sum(metrics[name] for metrics in recent) / len(recent) for name in names]
    return "  ".join(f"{name} {mean:.3f}" for name, mean in zip(names, means))


def shown(metrics):
    """Their names, without standard errors, which the log and the report have."""
    return [name for name in metrics if not name.endswith("_se")]


def means(name, values):
    """Values (N,) -> their mean and its standard error, by name."""
    values = values.float()
    error = {f"{name}_se": values.std().item() / len(values) ** 0.5} if len(values) > 1 else {}
    return {name: values.mean().item()} | error


class Best:
    """The weights with the least held-out loss of all that was measured in a run.

    None are kept where nothing is held out, as in the village, where fresh samples tell more.
    """

    def __init__(self):
        self.step, self.loss, self.weights, self.start = 0, math.inf, {}, {}
        self.worse_since, self.patience = 0, math.inf  # how many measurements

    def begin(self, model, measured):
        """Show what was measured before the first step. Not the accuracy: policy and reference are
        still one, so that rounding decides it."""
        self.start = {name: value for name, value in measured.items() if "accuracy" not in name}
        print("before the first step:", average([self.start], shown(self.start)))
        self.note(model, 0, measured)

    def note(self, model, step, measured):
        """Keep the weights if their loss is the least so far."""
        if "held-out/loss" not in measured:
            return
        self.worse_since += 1
        if measured["held-out/loss"] < self.loss:
            self.step, self.loss, self.worse_since = step, measured["held-out/loss"], 0
            self.weights = {name: weights.clone() for name, weights in model.state_dict().items()}

    def is_over(self):
        """Whether the loss has been above its least for as long as patience lasts."""
        return self.worse_since >= self.patience

    def take(self, model, name, steps):
        """Give the model its best weights at the end of a run, and say which they are."""
        if not self.weights:
            return
        model.load_state_dict(self.weights)
        said = f"the weights of step {self.step} of {steps}, which had the least held-out loss"
        if not self.step:
            said = "the weights from before the first step: no step brought the held-out loss down"
        elif self.step < steps:
            said += "; the steps after it only made it worse"
        print(f"{name} keeps {said}")

    def report(self, steps):
        """What the report says of it."""
        if not self.weights:
            return {}
        how = "the least held-out loss of all measured, on these very held-out rows"
        return {"kept": {"step": self.step, "of": steps, "by": how}, "start": self.start}
