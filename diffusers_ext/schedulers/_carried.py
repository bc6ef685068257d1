"""Schedulers that need tensors: a model of statistics travels with them, in a folder beside their config."""

from __future__ import annotations

import os
from typing import Any, ClassVar

from diffusers import ModelMixin

FOLDER = "statistics"  # not a file beside the config: diffusers would take the folder for that of a model


class CarriesStatistics:
    """Mixin, before the base scheduler. A subclass names its `statistics_class`, a `ModelMixin`.

    Statistics are handed over as `from_config(config, statistics=...)`. `save_pretrained` writes them into the folder
    `statistics`, and `from_pretrained` brings them back. Without them `set_timesteps` raises.
    """

    statistics_class: ClassVar[type[ModelMixin]]
    statistics: Any = None

    def use_statistics(self, statistics: Any) -> None:
        """Take statistics.

        Raises:
            ValueError: they are of another class.
        """
        if not isinstance(statistics, self.statistics_class):
            raise ValueError(
                f"`statistics` is {type(statistics).__name__}; {type(self).__name__} takes "
                f"{self.statistics_class.__name__}."
            )
        self.statistics = statistics
        self.register_to_config(_statistics=FOLDER)  # type: ignore[attr-defined]

    @classmethod
    def from_config(
        cls, config: Any = None, return_unused_kwargs: bool = False, statistics: Any = None, **kwargs: Any
    ) -> Any:
        """As in diffusers, with `statistics` as in `use_statistics`."""
        made = super().from_config(config, return_unused_kwargs=return_unused_kwargs, **kwargs)  # type: ignore[misc]
        if statistics is not None:
            (made[0] if return_unused_kwargs else made).use_statistics(statistics)
        return made

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike | None = None,
        subfolder: str | None = None,
        return_unused_kwargs: bool = False,
        **kwargs: Any,
    ) -> Any:
        """As in diffusers; statistics that were saved with it come back."""
        where = {
            name: kwargs[name] for name in ("cache_dir", "force_download", "local_files_only", "token", "revision") if name in kwargs
        }  # fmt: skip
        config = cls.load_config(pretrained_model_name_or_path, subfolder=subfolder, **where)  # type: ignore[attr-defined]
        if config.get("_statistics") is not None and kwargs.get("statistics") is None:
            place = "/".join(part for part in (subfolder, FOLDER) if part)
            kwargs["statistics"] = cls.statistics_class.from_pretrained(
                pretrained_model_name_or_path, subfolder=place, **where
            )
        return super().from_pretrained(  # type: ignore[misc]
            pretrained_model_name_or_path, subfolder=subfolder, return_unused_kwargs=return_unused_kwargs, **kwargs
        )

    def save_pretrained(self, save_directory: str | os.PathLike, push_to_hub: bool = False, **kwargs: Any) -> None:
        """As in diffusers, with the statistics in their folder."""
        if self.statistics is not None:
            self.statistics.save_pretrained(os.path.join(save_directory, FOLDER))
        super().save_pretrained(save_directory, push_to_hub=push_to_hub, **kwargs)  # type: ignore[misc]

    def require_statistics(self) -> None:
        """Raise `ValueError` unless there are statistics."""
        if self.statistics is None:
            name = type(self).__name__
            raise ValueError(
                f"`statistics` is None; make the scheduler with `{name}.from_config(config, statistics=...)`."
            )
