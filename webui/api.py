"""The named endpoints for scripts and other programs (docs/api.md)."""

# No "from __future__ import annotations": Gradio reads the types of the answers as they stand.

import inspect
import typing
from collections.abc import Callable
from functools import cache, wraps
from pathlib import Path
from typing import Annotated, Any, Literal, TypedDict

import gradio as gr
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, create_model

from nora_diffusion.config import UserError
from webui.bases import bases
from webui.jobs import JobView
from webui.messages import owner_of
from webui.protocol import Request, Weighted
from webui.studio import Studio

SAMPLING = "sampling"
"""Concurrency group of everything that draws, here and in the tab Create."""

STRICT = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class WeightedName(BaseModel):
    """An adapter of a call, by id or name, and how strong it is."""

    model_config = STRICT
    name: str = Field(max_length=200)
    weight: float = Field(1.0, ge=-2, le=2)


class CheckAnswer(TypedDict):
    """What is wrong with one photo."""

    photo: str
    level: str
    reason: str


class SubjectAnswer(TypedDict):
    """A subject; ``photos`` is their number."""

    id: str
    name: str
    class_name: str
    trigger: str
    photos: int
    created_at: float


class UploadAnswer(TypedDict):
    """Id of the new subject, and what is wrong with its photos."""

    subject: str
    checks: list[CheckAnswer]


class JobAnswer(TypedDict):
    """Where a training run stands."""

    job: str
    subject: str | None
    name: str
    base: str
    state: str
    step: int
    steps: int | None
    loss: float | None
    eta_s: float | None
    message: str


class AdapterAnswer(TypedDict):
    """An adapter; ``job`` is the run that made it."""

    id: str
    name: str
    kind: str
    base: str
    family: str | None
    trigger: str | None
    class_name: str | None
    r: int | None
    inner_r: int | None
    steps: int | None
    loss: float | None
    size_bytes: int
    created_at: float
    job: str | None


class SampleAnswer(TypedDict):
    """Pictures, and the settings of each as they stand inside it."""

    files: list[gr.FileData]
    settings: list[dict[str, Any]]


def _whole(value: Any) -> Any:
    # JSON of some programs has no whole numbers: 4.0 is 4.
    return int(value) if isinstance(value, float) and value.is_integer() else value


Id = Annotated[str, Field(min_length=1, max_length=200)]
Text = Annotated[str, Field(max_length=4000)]
Whole = BeforeValidator(_whole)
LIMITS: dict[str, Any] = {
    "name": Text,
    "class_name": Text,
    "trigger": Text,
    "rights": bool,
    "files": Annotated[list[Any], Field(min_length=1, max_length=100)],
    "subject": Id,
    "job": Id,
    "adapter": Id,
    "base": Annotated[str, Field(min_length=1, max_length=1000)],
    "overrides": dict[str, Any],
    "preset": typing.Optional[Annotated[str, Field(max_length=200)]],  # noqa: UP045
    "layout": Literal["native", "diffusers", "kohya"],
    "prompt": Text,
    "negative_prompt": Text,
    "adapters": Annotated[list[WeightedName], Field(max_length=4)],
    "n": Annotated[int, Whole, Field(ge=1, le=16)],
    "seed": Annotated[int, Whole, Field(ge=0, lt=2**32)],
    "steps": Annotated[int, Whole, Field(ge=1, le=200)],
    "guidance": Annotated[float, Field(ge=0, le=50)],
}
"""What each argument of an endpoint may be; Gradio hands on whatever JSON a request holds."""


def add_endpoints(studio: Studio) -> None:
    """Add the endpoints; call inside the app's ``gr.Blocks``."""
    of = Endpoints(studio)
    for method in (
        of.upload, of.subjects, of.train, of.status, of.jobs, of.stop, of.resume, of.adapters,
        of.download,
    ):  # fmt: skip
        gr.api(_checked(method), api_name=method.__name__)
    gr.api(_checked(of.sample), api_name="sample", concurrency_id=SAMPLING, concurrency_limit=1)


class Endpoints:
    """What a program can ask for; the names, types and first lines are the page of the API."""

    def __init__(self, studio: Studio) -> None:
        self.studio = studio

    def upload(
        self,
        name: str,
        files: list[gr.FileData],
        class_name: str,
        trigger: str,
        request: gr.Request,
        rights: bool = False,
    ) -> UploadAnswer:
        """Keep photos as a new subject; answers with its id and what is wrong with its photos.

        The first call of each user needs rights=True: you have the right to use these photos.
        """
        owner = owner_of(request)
        given = [_uploaded(self.studio, file, number) for number, file in enumerate(files, start=1)]
        if rights:
            self.studio.subjects.rights.confirm(owner)
        elif not self.studio.subjects.rights.confirmed(owner):
            raise UserError(
                "rights: give true once, if you have the right to use these photos; "
                "nothing was kept"
            )
        subject, checks = self.studio.subjects.create(owner, name, class_name, trigger, given)
        return {"subject": subject.id, "checks": [_answer(CheckAnswer, check) for check in checks]}

    def subjects(self, request: gr.Request) -> list[SubjectAnswer]:
        """List the subjects, newest first."""
        return [
            _answer(SubjectAnswer, subject, photos=len(subject.photos))
            for subject in self.studio.subjects.all(owner_of(request))
        ]

    def train(
        self,
        subject: str,
        request: gr.Request,
        base: str = "mini",
        overrides: dict[str, Any] = {},  # noqa: B006  # read only; Gradio lists it as the default
        preset: str | None = None,
    ) -> str:
        """Queue a training run; answers with the job's id. overrides has section.key to value."""
        return self.studio.jobs.submit(owner_of(request), subject, base, overrides, preset)

    def status(self, job: str, request: gr.Request) -> JobAnswer:
        """Tell where a job stands."""
        return _job_answer(self.studio.jobs.status(owner_of(request), job))

    def jobs(self, request: gr.Request) -> list[JobAnswer]:
        """List the jobs: running first, then the queue in its order, then the others."""
        return [_job_answer(job) for job in self.studio.jobs.all(owner_of(request))]

    def stop(self, job: str, request: gr.Request) -> JobAnswer:
        """Let a running job save and stop, or take a queued one out of the queue."""
        self.studio.jobs.stop(owner_of(request), job)
        return _job_answer(self.studio.jobs.status(owner_of(request), job))

    def resume(self, job: str, request: gr.Request) -> JobAnswer:
        """Queue a stopped, interrupted or failed job again; it goes on from its checkpoint."""
        self.studio.jobs.resume(owner_of(request), job)
        return _job_answer(self.studio.jobs.status(owner_of(request), job))

    def adapters(self, request: gr.Request) -> list[AdapterAnswer]:
        """List the adapters, newest first."""
        return [
            _answer(AdapterAnswer, adapter, job=adapter.job_id)
            for adapter in self.studio.library.all(owner_of(request))
        ]

    def download(
        self,
        adapter: str,
        request: gr.Request,
        layout: Literal["native", "diffusers", "kohya"] = "native",
    ) -> gr.FileData:
        """Give an adapter's file: native, or as a LoRA in the layout of diffusers or kohya."""
        owner = owner_of(request)
        found = self.studio.library.get(owner, adapter)
        return _file_answer(self.studio.library.download(owner, found.id, layout))

    def sample(
        self,
        prompt: str,
        request: gr.Request,
        adapters: list[dict[str, Any]] = [],  # noqa: B006  # as overrides of train
        n: int = 1,
        seed: int = 0,
        steps: int = 25,
        guidance: float = 3.0,
        negative_prompt: str = "",
        base: str = "mini",
    ) -> SampleAnswer:
        """Draw pictures with up to four adapters, each {"name": id or name, "weight": number}.

        Picture i has seed + i. base counts where there are no adapters.
        """
        owner = owner_of(request)
        wanted = typing.cast(list[WeightedName], adapters)
        found = [self.studio.library.get(owner, one.name) for one in wanted]
        if not found and base not in bases():
            raise UserError(f"base: {base[:200]!r} is none of {', '.join(bases())}")
        drawn = self.studio.sampler.draw(
            Request(
                base=found[0].base if found else base,
                prompt=prompt,
                negative_prompt=negative_prompt,
                adapters=tuple(
                    Weighted(one.path, asked.weight, one.id, one.name)
                    for one, asked in zip(found, wanted, strict=True)
                ),
                n=n,
                seed=seed,
                steps=steps,
                guidance=guidance,
            ),
            owner=owner,
        )
        for file, settings in zip(drawn.files, drawn.settings, strict=True):
            self.studio.pictures.add(owner, file, settings)
        return {"files": [_file_answer(file) for file in drawn.files], "settings": drawn.settings}


def _checked(function: Callable[..., Any]) -> Callable[..., Any]:
    """The endpoint with its arguments checked and its errors as messages."""
    parameters = inspect.signature(function).parameters
    model = _model_of(tuple(name for name in parameters if name != "request"))

    @wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        given = inspect.signature(function).bind(*args, **kwargs)
        given.apply_defaults()
        request = given.arguments.pop("request")
        try:
            found = model.model_validate(dict(given.arguments))
            values = {name: getattr(found, name) for name in type(found).model_fields}
            return function(request=request, **values)
        except ValidationError as error:
            raise gr.Error(_problems(error), print_exception=False) from None
        except UserError as error:
            # Read by programs, never as HTML by a page: so nothing is escaped.
            raise gr.Error(str(error), print_exception=False) from None

    return call


@cache
def _model_of(names: tuple[str, ...]) -> type[BaseModel]:
    fields: dict[str, Any] = {name: (LIMITS[name], ...) for name in names}
    return create_model("Arguments", __config__=STRICT, **fields)


def _problems(error: ValidationError) -> str:
    told = []
    for problem in error.errors(include_url=False, include_context=False):
        where = ".".join(str(part) for part in problem["loc"])
        given = repr(problem["input"])
        shown = given if len(given) <= 80 else f"{given[:77]}..."
        told.append(f"{where}: {problem['msg']}; given was {shown}")
    return "\n".join(told)


def _uploaded(studio: Studio, file: Any, number: int) -> tuple[Path, str]:
    path = file.get("path") if isinstance(file, dict) else file
    name = file.get("orig_name") if isinstance(file, dict) else None
    if not isinstance(path, str):
        raise UserError(f"files: {number} is not a file; give it as handle_file(path)")
    found = studio.folder.uploaded(path)
    return found, name if isinstance(name, str) and name else found.name


def _file_answer(path: Path) -> Any:
    return gr.FileData(path=str(path), orig_name=path.name).model_dump()


def _answer(kind: Any, view: Any, **other: Any) -> Any:
    """A view as the dict that ``kind`` says; ``other`` has what the view names otherwise."""
    names = typing.get_type_hints(kind)
    return {name: other[name] if name in other else getattr(view, name) for name in names}


def _job_answer(job: JobView) -> JobAnswer:
    return _answer(JobAnswer, job, job=job.id, subject=job.subject_id)
