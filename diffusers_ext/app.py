"""`diffusers-ext app`: try methods on a pipeline in the browser, side by side with the plain one. It needs gradio.

What it does without its page is in `_studio`; here is how that looks. `serve` runs until it is stopped, and `build` gives the
page as gradio has them, to be launched with `launch_options()`.
"""

from __future__ import annotations

import contextlib
import html
import math
import traceback
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ._options import Option, Setting, configs, samplers
from ._studio import Comparison, Model, Request, Run, Studio, Way, zoo
from .cards import table
from .enabling import HookConfig

if TYPE_CHECKING:
    import gradio as gr
    from PIL.Image import Image

_LOCAL = ("127.0.0.1", "localhost", "::1")
_PIPELINE = {"concurrency_limit": 1, "concurrency_id": "pipeline"}  # one request at a time in all that needs it
_HIDDEN = {"api_visibility": "private"}
_SMALLEST = 256  # pixels of a picture on the page
_CSS = """
.gradio-container { max-width: 1280px !important; }
#pictures .grid-wrap { min-height: 0 !important; max-height: none !important; height: auto !important; }
#numbers th, #numbers td:not(:first-child) { white-space: nowrap; word-break: normal; }
@media (max-width: 640px) {
    .gradio-container { padding: 8px !important; }
    #pictures .grid-container { grid-template-columns: repeat(2, minmax(0, 1fr)) !important; }
    #numbers th, #numbers td { padding: 4px 6px !important; }
}
"""
_INTRODUCTION = """\
# diffusers_ext
Make pictures plain and with methods on, from the same seeds. Each way that you generate joins the comparison, until what is
asked for changes. Calls are those of the denoiser, PSNR is likeness to the plain pictures.
"""


def serve(model: str = "avatars-sd", *, host: str = "127.0.0.1", port: int | None = None, share: bool = False) -> None:
    """Serve the page until it is stopped.

    Args:
        model: what it starts with: a checkpoint of the zoo, a repository on the Hub or a folder.
        host: address to listen at. Others than this machine's own cannot load folders.
        port: None takes the first free one from 7860 on.
        share: also a public link, by gradio's servers. Whoever has it can have repositories loaded here, and no folders.

    Raises:
        ValueError: gradio is missing, the port is taken, or the model is not there or none that makes pictures.
    """
    _gradio()
    try:
        page = build(Studio(folders=host in _LOCAL and not share, own=model), model)
    except OSError as error:
        raise ValueError(f"`model` is {model!r}: {error}") from None
    try:
        page.launch(server_name=host, server_port=port, share=share, **launch_options())
    except OSError as error:
        raise ValueError(f"`port` is {port!r}, which cannot be listened at on `host` {host!r}: {error}") from None


def launch_options() -> dict[str, Any]:
    """What the page is launched with, wherever that is."""
    return {"css": _CSS, "show_error": True, "ssr_mode": False, "footer_links": []}


def build(studio: Studio, model: str) -> gr.Blocks:
    """The page, with one queue for all that needs the pipeline.

    Raises:
        ValueError: gradio is missing, or the model is none that makes pictures.
        OSError: there is no such model.
    """
    return _Page(_gradio(), studio, studio.load(model)).blocks


def _gradio() -> Any:
    try:
        import gradio
    except ImportError as error:
        raise ValueError(f"The app needs gradio ({error}): pip install 'diffusers_ext[app]'") from None
    return gradio


class _Page:
    """Components of the page, and what happens in it.

    Args:
        gr: gradio.
        model: what the page starts with.
    """

    def __init__(self, gr: Any, studio: Studio, model: Model) -> None:
        self.gr, self.studio = gr, studio
        self.fields: dict[str, dict[str, Any]] = {}  # class of a method -> setting -> component
        self.groups: dict[str, Any] = {}  # class of a method -> what its settings are in
        with gr.Blocks(title="diffusers_ext", analytics_enabled=False, delete_cache=(3600, 3600)) as self.blocks:
            self.current, self.compared = gr.State(model), gr.State(None)
            gr.Markdown(_INTRODUCTION)
            with gr.Row():
                with gr.Column(scale=2, min_width=320):
                    self._lay_out_request(model)
                    self._lay_out_methods(model)
                with gr.Column(scale=3, min_width=320):
                    self.generate = gr.Button("Generate", variant="primary", elem_id="generate")
                    self._lay_out_results()
            self._connect()
        self.blocks.queue(max_size=100)

    # --- what it is made of ------------------------------------------------------------------------------------------

    def _lay_out_request(self, model: Model) -> None:
        gr, state = self.gr, self._for_model(model)
        self.model = gr.Dropdown(
            list(dict.fromkeys([*zoo(), model.name])), value=model.name, allow_custom_value=True, label="Model",
            info="One of the zoo, or the name of any diffusers repository on the Hub, and Enter", elem_id="model",
        )  # fmt: skip
        self.prompt = gr.Textbox(label="Prompt", lines=2, elem_id="prompt", **state["prompt"])
        self.label = gr.Dropdown(label="Class", allow_custom_value=True, elem_id="class", **state["label"])
        with gr.Row():
            self.steps = gr.Number(label="Steps", min_width=120, elem_id="steps", **state["steps"])
            self.guidance = gr.Number(label="Guidance", step=0.5, min_width=120, **state["guidance"])
        with gr.Row():
            self.plain_steps = gr.Number(label="Steps of the plain run", min_width=120, **state["steps"])
            self.plain_guidance = gr.Number(label="Its guidance", step=0.5, min_width=120, **state["guidance"])
        with gr.Row():
            self.seed = gr.Number(0, label="Seed", min_width=120)
            self.pictures = gr.Number(1, label="Pictures", min_width=120)
        with gr.Accordion("Size and negative prompt", open=False):
            self.negative = gr.Textbox(label="Negative prompt", **state["negative"])
            with gr.Row():
                self.height = gr.Number(label="Height", info="empty: its own", min_width=120, **state["height"])
                self.width = gr.Number(label="Width", info="empty: its own", min_width=120, **state["width"])

    def _lay_out_methods(self, model: Model) -> None:
        gr, state = self.gr, self._for_model(model)
        self.methods = gr.CheckboxGroup(label="Methods", elem_id="methods", **state["methods"])
        for option in configs().values():
            self._lay_out_settings(option)
        self.sampler = gr.Dropdown(label="Sampler", elem_id="sampler", **state["sampler"])
        for option in samplers().values():
            self._lay_out_settings(option)
        with gr.Row():
            self.adapter = gr.Textbox(
                label="LoRA or adapter",
                info="a repository on the Hub, with /file.safetensors where it has several",
                scale=2,
                min_width=160,
                elem_id="adapter",
            )
            self.strength = gr.Number(1.0, label="Strength", step=0.1, min_width=100)
        with gr.Accordion("What does not go on this pipeline, and why", open=False):
            self.reasons = gr.Markdown(**state["reasons"])

    def _lay_out_settings(self, option: Option) -> None:
        if not option.settings:
            return
        with self.gr.Accordion(f"Settings of {option.label}", visible=False) as group:
            self.fields[option.name] = {setting.name: self._field(setting) for setting in option.settings}
        self.groups[option.name] = group

    def _field(self, setting: Setting) -> Any:
        about = {"label": setting.name, "info": setting.help or None, "value": setting.shown}
        if setting.kind == "bool":
            return self.gr.Checkbox(**about)
        if setting.kind in ("int", "float"):
            return self.gr.Number(step=1 if setting.kind == "int" else 0.1, **about)
        return self.gr.Textbox(**about)

    def _lay_out_results(self) -> None:
        gr = self.gr
        self.gallery = gr.Gallery(
            label="Pictures", show_label=False, format="png", columns=2, object_fit="contain", height="auto",
            elem_id="pictures", buttons=["download", "fullscreen"],
        )  # fmt: skip
        self.numbers = gr.Markdown(elem_id="numbers")
        self.shown = gr.Dropdown([], label="Code and export of", visible=False, elem_id="shown")
        self.code = gr.Code(
            language="python", label="Code that does the same", interactive=False, wrap_lines=True, visible=False,
            buttons=["copy", "download"], elem_id="code",
        )  # fmt: skip
        self.export = gr.Button("Export as a repository", visible=False, elem_id="export")
        self.file = gr.File(label="Repository folder, zipped", visible=False, elem_id="file")

    def _connect(self) -> None:
        """What happens when."""
        results = [self.compared, self.gallery, self.numbers, self.shown, self.code, self.export, self.file]
        state = {
            "prompt": self.prompt, "label": self.label, "negative": self.negative, "steps": self.steps,
            "guidance": self.guidance, "height": self.height, "width": self.width, "methods": self.methods,
            "sampler": self.sampler, "reasons": self.reasons,
        }  # fmt: skip
        groups = list(self.groups.values())
        self.model.input(
            self._reaction(lambda values, progress: self._loaded(values, progress, state)),
            {self.model}, [self.current, *state.values(), self.plain_steps, self.plain_guidance, *groups],
            show_progress_on=self.model, **_PIPELINE, **_HIDDEN,
        )  # fmt: skip
        self.gr.on(
            [self.methods.change, self.sampler.change], self._show_groups, [self.methods, self.sampler], groups,
            show_progress="hidden", queue=False, **_HIDDEN,
        )  # fmt: skip
        form = {
            self.current, self.compared, self.model, self.prompt, self.label, self.negative, self.steps, self.guidance,
            self.plain_steps, self.plain_guidance, self.seed, self.pictures, self.height, self.width, self.methods,
            self.sampler, self.adapter, self.strength,
        }  # fmt: skip
        form |= {field for fields in self.fields.values() for field in fields.values()}
        self.gr.on(
            [self.generate.click, self.prompt.submit], self._reaction(self._generated), form, results,
            show_progress_on=self.gallery, trigger_mode="once", **_PIPELINE, **_HIDDEN,
        )  # fmt: skip
        self.shown.input(
            self._code_of, [self.compared, self.shown], [self.code, self.file], queue=False, show_progress="hidden",
            **_HIDDEN,
        )  # fmt: skip
        self.export.click(
            self._reaction(self._exported), {self.compared, self.shown}, self.file, **_PIPELINE, **_HIDDEN
        )

    # --- what happens ------------------------------------------------------------------------------------------------

    def _reaction(self, function: Callable[[Mapping[Any, Any], Any], Any]) -> Callable[..., Any]:
        """A function of an event: it gets the values of components, and errors are shown."""
        gr = self.gr

        def reaction(values: Any, progress: Any = gr.Progress()) -> Any:  # noqa: B008  # gradio looks for it there
            with _errors_shown(gr):
                return function(values, lambda share, what: progress(share, desc=what))

        return reaction

    def _for_model(self, model: Model) -> dict[str, dict[str, Any]]:
        """What components show for a model, by name of the component."""
        defaults, takes = model.defaults, model.takes
        not_here = {**model.configs, **model.samplers}
        options = {**configs(), **samplers()}
        reasons = [f"- **{options[name].label}**: {reason}" for name, reason in not_here.items() if reason is not None]
        own = ("the pipeline's own", "")
        return {
            "prompt": {"visible": takes == "prompt", "value": defaults.get("prompt", "")},
            "label": {"visible": takes == "class", "choices": list(model.classes), "value": defaults.get("prompt")},
            "negative": {"visible": model.has_negative_prompt},
            "steps": {"value": defaults["steps"]},
            "guidance": {"visible": "guidance_scale" in defaults, "value": defaults.get("guidance_scale")},
            "height": {"value": defaults.get("height")},
            "width": {"value": defaults.get("width")},
            "methods": {"choices": _choices(model.configs, configs()), "value": []},
            "sampler": {"choices": [own, *_choices(model.samplers, samplers())], "value": ""},
            "reasons": {"value": "\n".join(reasons) or "Everything does."},
        }

    def _loaded(self, values: Mapping[Any, Any], progress: Any, state: Mapping[str, Any]) -> dict[Any, Any]:
        model = self.studio.load(_trimmed(values[self.model]), progress)
        found = self._for_model(model)
        updates: dict[Any, Any] = {component: self.gr.update(**found[name]) for name, component in state.items()}
        updates[self.current] = model
        updates[self.plain_steps] = self.gr.update(**found["steps"])
        updates[self.plain_guidance] = self.gr.update(**found["guidance"])
        return updates | {group: self.gr.update(visible=False) for group in self.groups.values()}

    def _show_groups(self, methods: list[str], sampler: str) -> list[Any]:
        return [self.gr.update(visible=name in {*methods, sampler}) for name in self.groups]

    def _generated(self, values: Mapping[Any, Any], progress: Any) -> dict[Any, Any]:
        gr = self.gr
        model, name = values[self.current], _trimmed(values[self.model])
        if model.name != name:  # choosing it has failed; this says why
            model = self.studio.load(name, progress)
        request = self._request(values, model)
        comparison = self.studio.compare(values[self.compared], request, self._way(values), progress)
        names = [run.way.name for run in comparison.runs]
        return {
            self.compared: comparison,
            self.gallery: gr.update(value=_pictures(comparison), columns=min(max(len(names), 2), 4)),
            self.numbers: _numbers(comparison),
            self.shown: gr.update(
                choices=[(name, number) for number, name in enumerate(names)], value=len(names) - 1, visible=True
            ),
            self.code: gr.update(value=comparison.runs[-1].code, visible=True),
            self.export: gr.update(visible=True),
            self.file: gr.update(value=None, visible=False),
        }

    def _code_of(self, comparison: Comparison, number: int) -> list[Any]:
        return [comparison.runs[number].code, self.gr.update(value=None, visible=False)]

    def _exported(self, values: Mapping[Any, Any], progress: Any) -> Any:
        comparison: Comparison = values[self.compared]
        path = self.studio.export(comparison.request, comparison.runs[values[self.shown]].way, progress)
        return self.gr.update(value=str(path), visible=True)

    def _request(self, values: Mapping[Any, Any], model: Model) -> Request:
        return Request(
            model=model.name,
            prompt={"prompt": values[self.prompt], "class": values[self.label] or ""}.get(model.takes, ""),
            negative_prompt=values[self.negative] if model.has_negative_prompt else "",
            seed=_whole(values[self.seed]),
            pictures=_whole(values[self.pictures]),
            height=_whole(values[self.height]),
            width=_whole(values[self.width]),
            steps=_whole(values[self.plain_steps]),
            guidance_scale=values[self.plain_guidance],
        )

    def _way(self, values: Mapping[Any, Any]) -> Way:
        def given(option: Option) -> dict[str, Any]:
            return option.read({name: values[field] for name, field in self.fields.get(option.name, {}).items()})

        methods: list[HookConfig] = [(option := configs()[name]).cls(**given(option)) for name in values[self.methods]]
        sampler = values[self.sampler] or None
        return Way(
            steps=_whole(values[self.steps]),
            guidance_scale=values[self.guidance],
            configs=tuple(methods),
            sampler=sampler,
            settings={} if sampler is None else given(samplers()[sampler]),
            adapter=_trimmed(values[self.adapter]),
            strength=values[self.strength],
        )


@contextlib.contextmanager
def _errors_shown(gr: Any) -> Iterator[None]:
    """Errors on the page, as they are. What is no error of the input is also printed where the app runs."""
    try:
        yield
    except (ValueError, OSError) as error:
        raise gr.Error(html.escape(str(error)), duration=None, print_exception=False) from error
    except Exception as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        text = f"{type(error).__name__} in {Path(where.filename).name}, line {where.lineno}: {error or where.line}"
        raise gr.Error(html.escape(text), duration=None) from error


def _choices(fits: Mapping[str, str | None], options: Mapping[str, Option]) -> list[tuple[str, str]]:
    return [(options[name].label, name) for name, reason in fits.items() if reason is None]


def _trimmed(text: str | None) -> str:
    return (text or "").strip()


def _whole(value: Any) -> Any:
    """A number of a field, as an integer where it is one."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _pictures(comparison: Comparison) -> list[tuple[Image, str]]:
    """Pictures with their captions; those of one seed beside each other."""
    request, found = comparison.request, []
    for i in range(request.pictures):
        for run in comparison.runs:
            steps = "" if run.way.steps == request.steps else f", {run.way.steps} steps"
            found.append((_enlarged(run.pictures[i]), f"{run.way.title}{steps}"))
    return found


def _enlarged(picture: Image) -> Image:
    """A small picture with larger pixels."""
    factor = max(1, _SMALLEST // max(picture.size))
    return picture.resize((picture.width * factor, picture.height * factor), resample=0)


def _numbers(comparison: Comparison) -> str:
    rows: list[list[Any]] = [
        [run.way.name, f"{run.seconds:.2f} s", run.calls, _likeness(run)] for run in comparison.runs
    ]
    return table(["way", "time", "calls", "PSNR"], rows)


def _likeness(run: Run) -> str:
    if run.psnr is None:
        return ""
    return "the same" if math.isinf(run.psnr) else f"{run.psnr:.1f} dB"
