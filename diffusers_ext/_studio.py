"""What the app does, without its page: it loads pipelines, finds methods with their settings, makes pictures, compares them.

A `Request` says what pictures are asked for, a `Way` how they are made; the plain way has nothing on. `Studio.compare` makes the
pictures of a request plain and in another way, and gives each `Run` the code that does the same.
"""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import math
import os
import re
import shutil
import tempfile
import threading
import time
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoModel
from PIL.Image import Image

from ._options import REQUIRED, Option, configs, default_of, parameters, processes, samplers
from .enabling import HookConfig, enabled
from .hub import save_pretrained
from .loading import Pipeline
from .metrics import psnr
from .registry import LAZY_NAMES, load_entry, zoo_path

MAX_PICTURES = 8
Progress = Callable[[float, str], None]

# --- what is asked for -----------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Request:
    """Pictures that are asked for, and how the plain pipeline makes them.

    Attributes:
        model: name of a checkpoint of the zoo, a repository on the Hub, or a folder.
        prompt: text, or what of a pipeline's classes; without a meaning for unconditional pipelines.
        negative_prompt: text.
        seed: of the first picture; the others have those after it.
        pictures: how many.
        height, width: in pixels; None is the pipeline's own.
        steps, guidance_scale: of the plain pipeline; a scale of None is the pipeline's own.

    Raises:
        ValueError: a value is out of range.
    """

    model: str
    prompt: str = ""
    negative_prompt: str = ""
    seed: int = 0
    pictures: int = 1
    height: int | None = None
    width: int | None = None
    steps: int = 20
    guidance_scale: float | None = None

    def __post_init__(self) -> None:
        _check_whole("seed", self.seed, 0, 2**32)
        _check_whole("pictures", self.pictures, 1, MAX_PICTURES)
        for name in ("height", "width"):
            if getattr(self, name) is not None:
                _check_whole(name, getattr(self, name), 8, 4096)
        _check_sampling(self)

    @property
    def seeds(self) -> range:
        return range(self.seed, self.seed + self.pictures)


@dataclasses.dataclass(frozen=True)
class Way:
    """How the pictures of a request are made.

    Attributes:
        steps, guidance_scale: as in `Request`.
        configs: methods that are on.
        sampler: class name of a sampler, one of `samplers()`; None is the pipeline's own.
        settings: of the sampler.
        adapter: folder or Hub repository of a LoRA, that with `/` and the name of a file, or an adapter of this package.
        strength: weight of the LoRA; of adapters that imitate guidance, its scale.

    Raises:
        ValueError: a value is out of range.
    """

    steps: int = 20
    guidance_scale: float | None = None
    configs: tuple[HookConfig, ...] = ()
    sampler: str | None = None
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    adapter: str = ""
    strength: float = 1.0

    def __post_init__(self) -> None:
        _check_sampling(self)
        _check_finite("strength", self.strength)
        if self.sampler is not None and self.sampler not in samplers():
            raise ValueError(f"`sampler` is {self.sampler!r}; allowed are {', '.join(samplers())}.")

    @property
    def is_plain(self) -> bool:
        return not (self.configs or self.sampler or self.adapter)

    @property
    def title(self) -> str:
        """What is on, in a line."""
        parts = [] if self.sampler is None else [_titled(self.sampler.removesuffix("Scheduler"), self.settings)]
        parts += [_titled(type(config).__name__.removesuffix("Config"), _changed(config)) for config in self.configs]
        parts += [f"{self.adapter} ({self.strength:g})"] if self.adapter else []
        return " + ".join(parts) or "plain"

    @property
    def name(self) -> str:
        """What is on, steps and guidance, in a line."""
        text = f"{self.title}, {self.steps} steps"
        return text if self.guidance_scale is None else f"{text}, guidance {self.guidance_scale:g}"


@dataclasses.dataclass(frozen=True)
class Run:
    """Pictures that were made in one way, and what it took.

    Attributes:
        seconds: of the call of the pipeline.
        calls: of the denoiser. A call that a cache answers in part, or as a whole, counts.
        psnr: mean likeness to the plain pictures, in dB; infinite for the same ones, None for those themselves.
        code: Python that does the same.
    """

    way: Way
    pictures: list[Image]
    seconds: float
    calls: int
    psnr: float | None
    code: str


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Runs of one request, the plain one first."""

    request: Request
    runs: tuple[Run, ...]


def _check_sampling(target: Request | Way) -> None:
    _check_whole("steps", target.steps, 1, 1000)
    if target.guidance_scale is not None:
        _check_finite("guidance_scale", target.guidance_scale)


def _check_whole(name: str, value: Any, low: int, high: int) -> None:
    if type(value) is not int or not low <= value <= high:
        raise ValueError(f"`{name}` is {value!r}; allowed are whole numbers from {low} to {high}.")


def _check_finite(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ValueError(f"`{name}` is {value!r}; a number is needed.")


# --- pipelines -------------------------------------------------------------------------------------------------------

_AVATAR = "a person with tan skin and long red hair, clear glasses, a happy smile, navy clothes"
# What pictures of the zoo are asked with; of other models, the defaults of their pipelines.
ZOO: dict[str, dict[str, Any]] = {
    "avatars-sd": {"prompt": _AVATAR, "steps": 20, "guidance_scale": 3.0},
    "avatars-flow": {"prompt": _AVATAR, "steps": 20, "guidance_scale": 3.0, "height": 32, "width": 32},
    "fashion-dit": {"prompt": "sneaker", "steps": 20, "guidance_scale": 2.0},
    "fashion-ddpm": {"steps": 50},
}
_DENOISERS = ("unet", "transformer", "prior", "decoder")


@dataclasses.dataclass(frozen=True)
class Model:
    """What can be asked of a pipeline.

    Attributes:
        name: as in `Request`.
        class_name: of the pipeline.
        takes: "prompt", "class" or "nothing".
        classes: names of its classes.
        has_negative_prompt: whether there may be one.
        defaults: of the fields of a `Request`; without `guidance_scale` where there is no guidance.
        configs, samplers: class name -> None where it can be tried on the pipeline, else why not.
    """

    name: str
    class_name: str
    takes: str
    classes: tuple[str, ...]
    has_negative_prompt: bool
    defaults: Mapping[str, Any]
    configs: Mapping[str, str | None]
    samplers: Mapping[str, str | None]


def zoo() -> list[str]:
    """Names of the checkpoints of the zoo that are here and make pictures."""
    found = []
    for name in ZOO:
        with contextlib.suppress(ValueError):  # some lie in a source checkout only
            zoo_path(name)
            found.append(name)
    return found


def _takes(pipe: Any) -> str:
    names = _call_parameters(pipe)
    return "prompt" if "prompt" in names else "class" if "class_labels" in names else "nothing"


def _call_parameters(pipe: Any) -> Mapping[str, inspect.Parameter]:
    return inspect.signature(type(pipe).__call__).parameters


def describe(name: str, pipe: Any) -> Model:
    """What can be asked of `pipe`."""
    parameters = _call_parameters(pipe)
    guidance = _guidance_argument(pipe)
    defaults: dict[str, Any] = {"steps": parameters["num_inference_steps"].default, **ZOO.get(name, {})}
    if guidance is not None:
        defaults.setdefault("guidance_scale", parameters[guidance].default)
    classes = tuple(getattr(pipe, "labels", {})) if _takes(pipe) == "class" else ()
    if classes:
        defaults.setdefault("prompt", classes[0])
    return Model(
        name, type(pipe).__name__, _takes(pipe), classes, "negative_prompt" in parameters, defaults,
        {key: _why_no_config(option, pipe) for key, option in configs().items()},
        {key: _why_no_sampler(option, pipe) for key, option in samplers().items()},
    )  # fmt: skip


def denoisers(pipe: Any) -> dict[str, torch.nn.Module]:
    """The networks that are called at each step, by name."""
    return {
        name: part
        for name, part in pipe.components.items()
        if isinstance(part, torch.nn.Module) and name.startswith(_DENOISERS)
    }


def _why_no_config(option: Option, pipe: Any) -> str | None:
    reasons = [option.cls.supports(part) for part in denoisers(pipe).values()]
    if None not in reasons:
        return "; ".join(reasons) or "there is no denoiser"
    made = [s.name for s in option.settings if s.default is REQUIRED and s.kind != "str"]
    return f"{', '.join(made)} are made by its own functions" if made else None


def _why_no_sampler(option: Option, pipe: Any) -> str | None:
    scheduler = getattr(pipe, "scheduler", None)
    if scheduler is None:
        return "the pipeline has no scheduler"
    process = _process(scheduler.config)
    if process not in processes(option.cls):
        return f"it is not for the process of {type(scheduler).__name__}"
    try:
        made = _sampler(option, scheduler.config, {})
        shifts = made.config.get("use_dynamic_shifting") and "mu" in inspect.signature(made.set_timesteps).parameters
        made.set_timesteps(10, **({"mu": 1.0} if shifts else {}))
    except Exception as error:  # of any kind; shown as it is
        return str(error)
    return None


def _process(config: Mapping[str, Any]) -> str:
    """What process the config of a scheduler is of."""
    if config.get("use_flow_sigmas") or config.get("prediction_type") == "flow_prediction":
        return "flow"
    return "diffusion" if "beta_start" in config else "flow" if "shift" in config else "other"


def _sampler(option: Option, config: Mapping[str, Any], settings: Mapping[str, Any]) -> Any:
    return option.cls.from_config(config, **_sampler_arguments(option, config, settings))


def _sampler_arguments(option: Option, config: Mapping[str, Any], settings: Mapping[str, Any]) -> dict[str, Any]:
    """What `from_config` is given, so that nothing but the process is taken from the scheduler before.

    Rectified flow has to be told to diffusers' own samplers; ours read it from the config.
    """
    arguments = {s.name: s.default for s in option.settings if config.get(s.name, s.default) != s.default}
    is_stock = option.cls.__module__.partition(".")[0] == "diffusers"
    if is_stock and "beta_start" not in config and "use_flow_sigmas" in parameters(option.cls):
        arguments |= {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": config["shift"]}
    return {**arguments, **settings}


def _guidance_argument(pipe: Any) -> str | None:
    """Argument of a call that is the scale of guidance. Flux without an embedding of it has true guidance only."""
    names = _call_parameters(pipe)
    embeds = getattr(getattr(pipe, "transformer", None), "config", {}).get("guidance_embeds", True)
    if "true_cfg_scale" in names and not embeds:
        return "true_cfg_scale"
    return "guidance_scale" if "guidance_scale" in names else None


def call_arguments(pipe: Any, request: Request, steps: int, guidance_scale: float | None) -> dict[str, Any]:
    """Keyword arguments of a call, without generators.

    Raises:
        ValueError: the pipeline has no such class, or cannot be given a size.
    """
    parameters, count = _call_parameters(pipe), request.pictures
    arguments: dict[str, Any] = {}
    takes = _takes(pipe)
    if takes == "prompt":
        arguments["prompt"] = [request.prompt] * count
    elif takes == "class":
        arguments["class_labels"] = [_class(pipe, request.prompt)] * count
    else:
        arguments["batch_size"] = count
    guidance = _guidance_argument(pipe)
    if "negative_prompt" in parameters and (request.negative_prompt or guidance == "true_cfg_scale"):
        arguments["negative_prompt"] = [request.negative_prompt] * count
    if guidance is not None and guidance_scale is not None:
        arguments[guidance] = guidance_scale
    for name in ("height", "width"):
        if (value := getattr(request, name)) is not None:
            if name not in parameters:
                raise ValueError(f"`{name}` is {value!r}; pictures of {type(pipe).__name__} have one size.")
            arguments[name] = value
    if "max_sequence_length" in parameters:
        tokenizers = [part for key, part in pipe.components.items() if key.startswith("tokenizer") and part is not None]
        if tokenizers and tokenizers[-1].model_max_length < parameters["max_sequence_length"].default:
            arguments["max_sequence_length"] = tokenizers[-1].model_max_length
    return {**arguments, "num_inference_steps": steps}


def _class(pipe: Any, text: str) -> int:
    labels = getattr(pipe, "labels", {})
    if text in labels:
        return labels[text]
    if not text.isdecimal():
        raise ValueError(f"`prompt` is {text!r}; allowed are {', '.join(labels) or 'numbers of classes'}.")
    return int(text)


# --- code ------------------------------------------------------------------------------------------------------------


def code(pipe: Any, request: Request, way: Way, arguments: Mapping[str, Any], adapter: Any = None) -> str:
    """Python that makes the pictures of a request in one way.

    Args:
        pipe: the pipeline as it was loaded.
        arguments: of the call, as `call_arguments` gives them.
        adapter: class of the adapter; None for a LoRA.
    """
    imports = {"import diffusers_ext as dx", "import torch"}
    source = f'dx.zoo_path("{request.model}")' if request.model in zoo() else _text(request.model)
    lines = [f"pipe = dx.Pipeline.from_pretrained({source}, dtype={pipe.dtype}).to({_text(str(pipe.device))})"]
    if way.adapter and adapter is not None:
        line, name = _place(_public_name(adapter))
        imports.add(line)
        load = f"{name}.from_pretrained({_text(way.adapter)}, dtype={pipe.dtype}).to({_text(str(pipe.device))})"
        lines.append(f"{load}.attach({_attach_arguments(adapter, way)})")
    elif way.adapter:
        place, file = _lora(way.adapter)
        name = "" if file is None else f"weight_name={_text(file)}, "
        lines.append(f'pipe.load_lora_weights({_text(place)}, {name}adapter_name="app", use_safetensors=True)')
        lines.append(f'pipe.set_adapters(["app"], [{way.strength}])')
    if way.sampler is not None:
        option = samplers()[way.sampler]
        line, name = _place(option.place)
        imports.add(line)
        settings = _sampler_arguments(option, pipe.scheduler.config, way.settings)
        more = "".join(f", {key}={_text(value)}" for key, value in settings.items())
        lines.append(f"pipe.scheduler = {name}.from_config(pipe.scheduler.config{more})")
    for config in way.configs:
        line, name = _place(configs()[type(config).__name__].place)
        imports.add(line)
        lines.append(f"dx.enable(pipe, {_call(name, _changed(config))})")
    seeds = f"range({request.seed}, {request.seed + request.pictures})"
    call = [f"{name}={_repeated(value)}" for name, value in arguments.items()]
    call.append(f"generator=[torch.Generator().manual_seed(seed) for seed in {seeds}]")
    lines += ["images = pipe(", *(f"    {argument}," for argument in call), ").images"]
    lines += ["for number, image in enumerate(images):", '    image.save(f"picture-{number}.png")']
    return "\n".join([*sorted(imports, key=lambda line: line.split()[1]), "", *lines, ""])


def _place(name: str) -> tuple[str, str]:
    """How a public name is imported, and what it is called then."""
    if "." not in name:
        return "import diffusers_ext as dx", f"dx.{name}"
    module, _, attribute = name.rpartition(".")
    return f"from {module} import {attribute}", attribute


def _public_name(cls: type) -> str:
    return cls.__name__ if cls.__name__ in LAZY_NAMES else f"{cls.__module__}.{cls.__name__}"


def _attach_arguments(adapter: Any, way: Way) -> str:
    return "".join(["pipe", *(f", {name}={value}" for name, value in _strength(adapter, way).items())])


def _strength(adapter: Any, way: Way) -> dict[str, float]:
    return {"guidance_scale": way.strength} if "guidance_scale" in inspect.signature(adapter.attach).parameters else {}


def _changed(config: HookConfig) -> dict[str, Any]:
    """Settings that differ from the defaults."""
    found = {field.name: (getattr(config, field.name), default_of(field)) for field in dataclasses.fields(config)}
    return {name: value for name, (value, default) in found.items() if default is REQUIRED or value != default}


def _call(name: str, arguments: Mapping[str, Any]) -> str:
    return f"{name}({', '.join(f'{key}={_text(value)}' for key, value in arguments.items())})"


def _titled(name: str, settings: Mapping[str, Any]) -> str:
    """A name, with settings where there are any; long ones, such as tables, cut."""
    text = _call(name, settings) if settings else name
    return text if len(text) <= 80 else f"{text[:77]}..."


def _text(value: Any) -> str:
    """A value as Python, strings in double quotes where they can be."""
    if isinstance(value, str) and '"' not in value and "\\" not in value and value.isprintable():
        return f'"{value}"'
    return repr(value)


def _repeated(value: Any) -> str:
    """A value as Python; a list of equal ones as a product."""
    if isinstance(value, list) and len(value) > 1:
        return f"[{_text(value[0])}] * {len(value)}"
    return f"[{_text(value[0])}]" if isinstance(value, list) else _text(value)


# --- at work ---------------------------------------------------------------------------------------------------------


class Studio:
    """Holds the pipeline that was used last, and lets one request at it at a time.

    Args:
        folders: whether models and adapters may be folders of this machine; where strangers ask, they may not.
        own: a model that may be a folder in any case.
    """

    def __init__(self, folders: bool = True, own: str = "") -> None:
        self.folders, self.own = folders, own
        self.device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
        self.dtype = torch.bfloat16 if self.device == "cuda" and torch.cuda.is_bf16_supported() else torch.float32
        self._lock = threading.Lock()
        self._loaded: tuple[str, Any] | None = None
        self._warm: set[tuple[Any, ...]] = set()
        self._exports = tempfile.TemporaryDirectory(prefix="diffusers_ext-app-")

    def load(self, model: str, progress: Progress | None = None) -> Model:
        """Load a pipeline, unless it is loaded, and tell what can be asked of it.

        Raises:
            ValueError: it is none that makes pictures, or a folder, and those are not allowed.
            OSError: there is no such repository or folder.
        """
        with self._lock:
            return describe(model, self._pipeline(model, progress or _silent))

    def compare(
        self, before: Comparison | None, request: Request, way: Way, progress: Progress | None = None
    ) -> Comparison:
        """Make the pictures of a request in one way, and plain unless `before` has them.

        Args:
            before: what was compared so far; it goes on where it is of the same request.
            progress: called with a share in [0, 1] and what is being done.

        Raises:
            ValueError: something does not fit the pipeline; it is as it was before.
        """
        progress = progress or _silent
        with self._lock:
            pipe = self._pipeline(request.model, progress)
            runs = before.runs if before is not None and before.request == request else ()
            plain = Way(request.steps, request.guidance_scale)
            if runs and way == plain:
                return before  # type: ignore[return-value]  # it has runs
            self._warm_up(pipe, request, progress)
            new = self._run(pipe, request, way, progress)  # before the plain one, since it might not fit
            if not runs:
                runs = (new if way == plain else self._run(pipe, request, plain, progress),)
            if way != plain:
                new = dataclasses.replace(new, psnr=psnr(new.pictures, runs[0].pictures).mean().item())
                runs = (*(run for run in runs if run.way != way), new)
        return Comparison(request, runs)

    def export(self, request: Request, way: Way, progress: Progress | None = None) -> Path:
        """Save the pipeline with what is on as the folder of a repository, in a zip file. The one before it is deleted.

        Raises:
            ValueError: it cannot be saved so that it loads again.
        """
        progress = progress or _silent
        with self._lock:
            pipe = self._pipeline(request.model, progress)
            progress(0.3, "Saving the pipeline")
            parent = Path(self._exports.name)
            for old in parent.iterdir():
                shutil.rmtree(old)
            parts = [request.model.rstrip("/").rpartition("/")[2], *(config.key for config in way.configs)]
            folder = Path(tempfile.mkdtemp(dir=parent)) / re.sub(r"[^\w.-]", "-", "-".join(parts))
            with self._dressed(pipe, way) as adapter:
                if adapter is not None:
                    raise ValueError(f"`adapter` is {way.adapter!r}; a pipeline's folder holds no {adapter.__name__}.")
                save_pretrained(pipe, folder)
            progress(0.8, "Packing")
            target = folder.with_name(f"{folder.name}.zip")
            with zipfile.ZipFile(target, "w") as file:  # weights do not get smaller
                for path in sorted(path for path in folder.rglob("*") if path.is_file()):
                    file.write(path, path.relative_to(folder.parent))
            shutil.rmtree(folder)
            return target

    def _pipeline(self, model: str, progress: Progress) -> Any:
        if self._loaded is not None and self._loaded[0] == model:
            return self._loaded[1]
        place = str(zoo_path(model)) if model in zoo() else self._checked(model, "model")
        progress(0.0, f"Loading {model}")
        self._loaded = None  # first, so that there is room
        self._warm.clear()
        pipe = Pipeline.from_pretrained(place, dtype=self.dtype, use_safetensors=True).to(self.device)
        missing = [name for name in ("num_inference_steps", "generator") if name not in _call_parameters(pipe)]
        if missing or not denoisers(pipe):
            raise ValueError(
                f"`model` is {model!r}, a {type(pipe).__name__}, which is not asked for pictures by steps."
            )
        pipe.set_progress_bar_config(disable=True)
        self._loaded = (model, pipe)
        return pipe

    def _checked(self, place: str, name: str) -> str:
        if not place:
            raise ValueError(f"`{name}` is empty; the name of a repository on the Hub is needed.")
        if (
            not self.folders
            and place != self.own
            and (os.path.exists(place) or os.path.isabs(place) or place.startswith((".", "~")))
        ):
            raise ValueError(f"`{name}` is {place!r}; this server takes repositories on the Hub, no folders.")
        return place

    @contextlib.contextmanager
    def _dressed(self, pipe: Any, way: Way) -> Iterator[Any]:
        """Everything of a way on the pipeline, and off again afterwards; gives the class of the adapter."""
        with contextlib.ExitStack() as stack:
            cls = self._put_on_adapter(pipe, way, stack) if way.adapter else None
            if way.sampler is not None:
                stack.callback(setattr, pipe, "scheduler", pipe.scheduler)
                pipe.scheduler = _sampler(samplers()[way.sampler], pipe.scheduler.config, way.settings)
            for config in way.configs:
                for name, value in _changed(config).items():
                    if isinstance(value, str) and not self.folders:
                        self._checked(value, name)
            if way.configs:
                stack.enter_context(enabled(pipe, *way.configs))
            yield cls

    def _put_on_adapter(self, pipe: Any, way: Way, stack: contextlib.ExitStack) -> Any:
        place = self._checked(way.adapter, "adapter")
        place, file = _lora(place)
        cls = _adapter_class(place) if file is None else None
        if cls is not None:
            adapter = cls.from_pretrained(place, dtype=self.dtype).to(self.device)
            adapter.attach(pipe, **_strength(cls, way))
            stack.callback(adapter.detach)
            return cls
        if not hasattr(pipe, "load_lora_weights"):
            raise ValueError(f"`adapter` is {place!r}; {type(pipe).__name__} takes no LoRA files.")
        if pipe.get_list_adapters():
            raise ValueError(f"`adapter` is {place!r}; the pipeline has LoRA files of its own, and none go with those.")
        stack.callback(pipe.unload_lora_weights)
        pipe.load_lora_weights(place, weight_name=file, adapter_name="app", use_safetensors=True)
        pipe.set_adapters(["app"], [way.strength])
        return None

    def _warm_up(self, pipe: Any, request: Request, progress: Progress) -> None:
        """Two steps, once for each shape: the first run of a pipeline takes longer."""
        shape = (request.pictures, request.height, request.width)
        if shape not in self._warm:
            progress(0.0, "Warming up")
            arguments = call_arguments(pipe, request, 2, request.guidance_scale)
            pipe(**arguments, generator=_generators(request))
            self._warm.add(shape)

    def _run(self, pipe: Any, request: Request, way: Way, progress: Progress) -> Run:
        arguments = call_arguments(pipe, request, way.steps, way.guidance_scale)
        per_step = 2 if arguments.get("true_cfg_scale", 1) > 1 else 1
        calls = 0

        def count(*_: Any) -> None:
            nonlocal calls
            calls += 1
            progress(min(calls / (per_step * max(len(pipe.scheduler.timesteps), 1)), 1.0), way.name)

        with self._dressed(pipe, way) as adapter, contextlib.ExitStack() as stack:
            for part in denoisers(pipe).values():
                stack.callback(part.register_forward_pre_hook(count).remove)
            generators = _generators(request)
            self._wait()
            began = time.perf_counter()
            pictures = getattr(pipe(**arguments, generator=generators), "images", None)
            self._wait()
            seconds = time.perf_counter() - began
        if pictures is None:
            raise ValueError(f"`model` is {request.model!r}, a {type(pipe).__name__}, which makes no pictures.")
        return Run(way, pictures, seconds, calls, None, code(pipe, request, way, arguments, adapter))

    def _wait(self) -> None:
        if self.device != "cpu":
            getattr(torch, self.device).synchronize()


def _lora(place: str) -> tuple[str, str | None]:
    """Folder or repository, and name of the file where it is given."""
    parent, _, file = place.rpartition("/")
    return (parent, file) if parent and file.endswith(".safetensors") else (place, None)


def _adapter_class(place: str) -> Any:
    """Class of ours that a repository holds an adapter of; None for a LoRA, which has no config."""
    try:
        name = AutoModel.load_config(place).get("_class_name")
    except OSError:  # also where there is no such repository, which loading the LoRA says
        return None
    cls = load_entry(name) if name in LAZY_NAMES else None
    if not (isinstance(cls, type) and hasattr(cls, "attach")):
        raise ValueError(f"`adapter` is {place!r}, which holds a {name}; a LoRA or an adapter with `attach` is needed.")
    return cls


def _generators(request: Request) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in request.seeds]


def _silent(share: float, what: str) -> None:
    pass
