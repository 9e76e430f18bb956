"""How prompts become generation batches and optimizer steps, in numbers."""

from dataclasses import dataclass


@dataclass(frozen=True)
class BatchPlan:
    """What a run does with its prompts. All options are those of the configuration, resolved."""

    num_prompts: int
    """Of the training set; 0 where it has no length."""
    num_generations: int
    batch_size: int
    """`per_device_train_batch_size`: completions of a rank in a micro-step."""
    accumulation: int
    """Micro-steps of an optimizer step."""
    steps_per_generation: int
    """Micro-steps of a generation batch."""
    num_iterations: int
    ranks: int

    @property
    def completions(self) -> int:
        """Of a generation batch, over all ranks."""
        return self.batch_size * self.steps_per_generation * self.ranks

    @property
    def groups(self) -> int:
        """Prompts of a generation batch, over all ranks."""
        return self.completions // self.num_generations

    @property
    def mini_batch(self) -> int:
        """Completions of an optimizer step, over all ranks."""
        return self.batch_size * self.accumulation * self.ranks

    @property
    def steps_per_generation_batch(self) -> float:
        """Optimizer steps that a generation batch serves; below 1 where a step needs several."""
        return self.num_iterations * self.steps_per_generation / self.accumulation

    @property
    def off_policy(self) -> float:
        """Share of optimizer steps whose completions are from an earlier policy."""
        return max(0.0, 1 - 1 / self.steps_per_generation_batch)

    @property
    def generation_batches_per_epoch(self) -> int:
        return self.num_prompts // self.groups

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps; an unfinished one does not count."""
        return int(self.generation_batches_per_epoch * self.steps_per_generation_batch)

    @property
    def unseen(self) -> int:
        """Prompts that an epoch leaves out, because they do not fill a generation batch; shuffling changes which."""
        return self.num_prompts % self.groups if self.num_prompts else 0

    def lines(self) -> list[str]:
        """Describe the plan, a line for each fact."""
        lines = [
            f"generation batch: {self.groups} prompts x {self.num_generations} = {self.completions} completions, "
            f"{self.completions // self.ranks} on each of {_count(self.ranks, 'rank')}"
        ]
        served = self.steps_per_generation_batch
        if served >= 1:
            lines.append(
                f"optimizer step: {self.mini_batch} completions; a generation batch serves {_count(served, 'step')}"
            )
        else:
            lines.append(f"optimizer step: {self.mini_batch} completions, of {1 / served:g} generation batches")
        lines.append(
            f"off policy: {self.off_policy:.0%} of the steps, up to {_count(served - 1, 'step')} old"
            if self.off_policy
            else "on policy: every step trains on completions of the current policy"
        )
        if self.num_prompts:
            unseen = f"; {self.unseen} of them, too few for a generation batch, are left out" * bool(self.unseen)
            steps = _count(self.steps_per_epoch, "optimizer step")
            lines.append(f"epoch: {_count(self.num_prompts, 'prompt')} = {steps}{unseen}")
        return lines


def _count(number: float, name: str) -> str:
    shown = f"{number:,}" if isinstance(number, int) else f"{number:g}"
    return f"{shown} {name}{'s' * (number != 1)}"
