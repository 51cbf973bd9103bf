"""How a chat's answers are generated, as flags, the terminal's commands and the browser's sliders set it. No torch."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from bhpeft.arguments import check_sampling
from bhpeft.errors import InputError, nearest


@dataclass
class Settings:
    """How answers are generated.

    Attributes:
        do_sample: draw tokens; else the likeliest is taken each time, and the other settings do nothing.
        temperature, top_k, top_p: as of `prediction.sampling_config`.
        seed: of the drawn tokens; each answer begins from it. None: another each time.
    """

    max_new_tokens: int = 200
    do_sample: bool = True
    temperature: float = 0.7
    top_k: int = 50
    top_p: float = 0.95
    seed: int | None = None

    def changed(self, name: str, value: str) -> Settings:
        """The settings with one of them read from text.

        Raises:
            InputError: there is no such setting, or the value cannot be.
        """
        known = {field.name: type(field.default) for field in dataclasses.fields(self)}
        if name not in known:
            raise InputError(f"{name}: no such setting.{nearest(name, known)} Known: {', '.join(known)}")
        try:
            if name == "do_sample":
                read: object = {"true": True, "false": False}[value.lower()]
            elif name == "seed":
                read = None if value.lower() == "none" else int(value)
            else:
                read = known[name](value)
        except (KeyError, ValueError):
            words = {"do_sample": "true or false", "seed": "a whole number or none"}.get(name, "a number")
            raise InputError(f"{name} {value}: must be {words}") from None
        new = dataclasses.replace(self, **{name: read})
        new.check()
        return new

    def check(self) -> None:
        """Raise `InputError` for values that cannot be."""
        if self.max_new_tokens < 1:
            raise InputError(f"max_new_tokens {self.max_new_tokens}: must be at least 1")
        if self.seed is not None and not 0 <= self.seed < 2**32:
            raise InputError(f"seed {self.seed}: must be at least 0 and below 2**32")
        check_sampling(self.temperature, self.top_k, self.top_p)
