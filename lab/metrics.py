"""Means with their errors, the check of the first loss, and the best weights of a run."""

import math

from tqdm import tqdm


def means(name, values):
    """Values (N,) -> their mean and its standard error, by name."""
    values = values.float()
    error = {f"{name}_se": values.std().item() / len(values) ** 0.5} if len(values) > 1 else {}
    return {name: values.mean().item()} | error


def check_first_loss(loss, expected, config):
    """Refuse a policy that is not the reference before its first step: their losses would differ.

    loss: of the policy's log-probabilities. expected: of the reference's own, put in their place.
    """
    # Other batches change the last digits of float32, and the second digit of bfloat16.
    tolerance = max(1, config.beta) * (1e-3 if config.dtype == "float32" else 5e-2)
    if not abs(loss - expected) <= tolerance * max(1, abs(expected)):
        raise SystemExit(f"the policy's first loss is {loss:.4f}, the reference's {expected:.4f}")
    tqdm.write(f"loss before the first step: {loss:.4f}; the reference's own: {expected:.4f}")


def weight_sums(model):
    """A fingerprint of a model: the sum of each of its weights."""
    return [weights.double().sum().item() for weights in model.state_dict().values()]


def at_reference(found):
    """What is measured of a policy that is still the reference, without its accuracies: there
    every margin is 0, so that rounding decides them."""
    return {name: value for name, value in found.items() if "accuracy" not in name}


class Best:
    """The weights with the least held-out loss of all that was measured in a run.

    None are kept where nothing is held out, as in the village, where fresh samples tell more.
    """

    def __init__(self):
        self.step, self.loss, self.weights = 0, math.inf, {}
        self.start = {}  # what was measured before the first step
        self.worse_since, self.patience = 0, math.inf  # both count measurements

    def note(self, model, step, measured):
        """Keep the weights if their loss is the least so far."""
        if "held-out/loss" not in measured:
            return
        self.worse_since += 1
        if measured["held-out/loss"] < self.loss:
            self.step, self.loss, self.worse_since = step, measured["held-out/loss"], 0
            for name, weights in model.state_dict().items():
                self.weights[name] = weights.clone()  # in place of the last one, which is freed
        if not self.step and self.worse_since == 3:
            tqdm.write(
                "three measurements, and no held-out loss is below that before the first step: "
                "a lower --lr may help"
            )

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

    def report(self, steps, found):
        """Print what was measured of the kept weights -> it, and which weights these are."""
        if not self.weights:
            return found
        found = found if self.step else at_reference(found)
        names = [name for name in found if f"{name}_se" in found]
        texts = [f"{name} {found[name]:.3f} ± {found[f'{name}_se']:.3f}" for name in names]
        if texts:
            print("of these weights, ± standard error:", "  ".join(texts))
        how = "the least held-out loss of all measured, on these very held-out rows"
        kept = {"step": self.step, "of": steps, "by": how}
        return found | {"kept": kept, "start": self.start}
