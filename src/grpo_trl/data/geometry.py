"""How many micro-steps a generation batch has, so that it splits neither a group nor an optimizer step."""

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Geometry:
    """The options that a generation batch must go with."""

    per_device_train_batch_size: int
    """Completions of a rank in a micro-step."""
    num_generations: int
    gradient_accumulation_steps: int
    num_iterations: int
    world_size: int

    @property
    def completions_per_micro_step(self) -> int:
        """Over all ranks."""
        return self.per_device_train_batch_size * self.world_size

    def micro_steps(self, steps_per_generation: int | None, generation_batch_size: int | None) -> int:
        """Micro-steps of a generation batch: as one of the options says, or else those of an optimizer step.

        Raises:
            ValueError: The options contradict each other, or a generation batch would split an optimizer step or a group.
        """
        by_batch_size = generation_batch_size is not None
        if generation_batch_size is not None:
            steps = self._of_generation_batch(generation_batch_size, steps_per_generation)
        else:
            steps = self.gradient_accumulation_steps if steps_per_generation is None else steps_per_generation
        self._check_steps(steps, by_batch_size)
        self._check_groups(steps, by_batch_size)
        return steps

    def _of_generation_batch(self, generation_batch: int, steps: int | None) -> int:
        step = self.completions_per_micro_step
        if steps is not None and generation_batch != step * steps:
            raise ValueError(
                f"generation_batch_size={generation_batch} and steps_per_generation={steps} contradict each other "
                "(a micro-step has "
                f"{step} completions); set only one of them."
            )
        if generation_batch < 1 or generation_batch % step:
            raise ValueError(
                f"generation_batch_size={generation_batch} must be a multiple of the {step} completions of a micro-step "
                f"(per_device_train_batch_size={self.per_device_train_batch_size} x {self.world_size} ranks), e.g. "
                f"{self._nearest_batch_sizes(generation_batch)}."
            )
        return generation_batch // step

    def _check_steps(self, steps: int, by_batch_size: bool) -> None:
        if self._holds_whole_steps(steps):
            return
        rule = "a multiple of it" + (", or a divisor of it" if self.num_iterations == 1 else "")
        remedy = _nearest(steps, lambda n: self._holds_whole_steps(n) and self._holds_whole_groups(n))
        if by_batch_size:
            remedy += f" (generation_batch_size={self._nearest_batch_sizes(self.completions_per_micro_step * steps)})"
        raise ValueError(
            f"steps_per_generation={steps} does not go with "
            f"gradient_accumulation_steps={self.gradient_accumulation_steps}: with num_iterations={self.num_iterations} it "
            f"must be {rule}, e.g. {remedy}."
        )

    def _check_groups(self, steps: int, by_batch_size: bool) -> None:
        if self._holds_whole_groups(steps):
            return
        batch, group = self.per_device_train_batch_size, self.num_generations
        total = self.completions_per_micro_step * steps
        if by_batch_size:
            remedy = f"generation_batch_size={self._nearest_batch_sizes(total)}"
        else:
            sizes = _nearest(batch, lambda n: n * self.world_size * steps % group == 0)
            remedy = f"per_device_train_batch_size={sizes}"
        groups = _nearest(group, lambda n: total % n == 0, least=2, most=total)
        raise ValueError(
            f"per_device_train_batch_size={batch} x {self.world_size} ranks x steps_per_generation={steps} is {total} "
            f"completions, which is no whole number of groups of num_generations={group}; use {remedy}"
            + (f", or num_generations={groups}." if groups else ".")
        )

    def _holds_whole_steps(self, steps: int) -> bool:
        """Whether a generation batch of `steps` micro-steps is a number of optimizer steps, or lies within one."""
        accumulation = self.gradient_accumulation_steps
        return steps % accumulation == 0 or (self.num_iterations == 1 and accumulation % steps == 0)

    def _holds_whole_groups(self, steps: int) -> bool:
        return self.completions_per_micro_step * steps % self.num_generations == 0

    def _nearest_batch_sizes(self, generation_batch: int) -> str:
        """The values of `generation_batch_size` next to the one given that work with the other options."""
        step = self.completions_per_micro_step

        def works(n: int) -> bool:
            return n % step == 0 and self._holds_whole_steps(n // step) and self._holds_whole_groups(n // step)

        return _nearest(generation_batch, works)


def _nearest(value: int, works: Callable[[int], bool], least: int = 1, most: int = 1_000_000) -> str:
    """The values next to `value`, below and above, that work, as "A or B"; empty if there are none."""
    below = next((n for n in range(value - 1, least - 1, -1) if works(n)), None)
    above = next((n for n in range(max(value + 1, least), most + 1) if works(n)), None)
    return " or ".join(str(n) for n in (below, above) if n is not None)
