"""The form of the tab "Create": what is to be drawn, and putting a picture's settings back in."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import Any

import gradio as gr

from nora_diffusion.config import UserError
from webui.bases import base_choices, bases, config_of, defaults
from webui.library import AdapterView
from webui.messages import as_text
from webui.pictures import PictureSettings
from webui.protocol import Request, Weighted
from webui.sampler import ADAPTERS_AT_MOST, SIDE_AT_MOST_PX
from webui.studio import Studio
from webui.tabs import Updates, Values
from webui.tabs.create_view import NO_ADAPTER, base_label, example


class CreateForm:
    """The form's components by name; ``components`` are those that hold what a person chose."""

    def __init__(self, studio: Studio) -> None:
        self.studio = studio
        self._make_words()
        self._make_numbers()
        self.order = gr.State([])  # ids of the adapters whose strengths the sliders are, in order
        self.basis = gr.State("mini")  # base whose defaults steps and guidance were set to
        self.components = {
            self.adapters, self.base, self.prompt, self.negative, self.count, self.seed,
            self.steps, self.guidance, self.width, self.height, *self.strengths, self.order,
            self.basis,
        }  # fmt: skip
        self.followers = [
            self.base, self.prompt, self.order, self.basis, self.steps, self.guidance,
            *self.strengths,
        ]  # fmt: skip
        """What ``follow`` may change."""

    # --- components

    def _make_words(self) -> None:
        self.empty = gr.HTML(NO_ADAPTER, elem_id="create-empty", visible=False)
        self.adapters = gr.Dropdown(
            [], value=[], multiselect=True, max_choices=ADAPTERS_AT_MOST, label="Adapters",
            info=f"Up to {ADAPTERS_AT_MOST} are blended; none: the base model alone.",
            elem_id="create-adapters",
        )  # fmt: skip
        self.strengths = [
            gr.Slider(
                -2, 2, 1, step=0.05, label="Strength", visible=False,
                elem_id=f"create-strength-{index + 1}",
            )
            for index in range(ADAPTERS_AT_MOST)
        ]  # fmt: skip
        self.base = gr.Dropdown(
            base_choices(), value="mini", label="Base model", elem_id="create-base"
        )
        self.prompt = gr.Textbox(
            label="Prompt", lines=3, max_length=4000, elem_id="create-prompt",
            placeholder=example(None),
        )  # fmt: skip
        self.negative = gr.Textbox(
            label="Negative prompt", lines=1, max_length=4000, elem_id="create-negative",
            placeholder="what the pictures should not show",
        )  # fmt: skip

    def _make_numbers(self) -> None:
        sample = defaults("mini").sample
        self.count = gr.Slider(1, 16, 4, step=1, label="Pictures", elem_id="create-count")
        with gr.Row(equal_height=True, elem_classes="create-seed-row"):
            self.seed = gr.Number(
                0, precision=0, label="Seed of the first picture", elem_id="create-seed",
                min_width=140, scale=3,
            )  # fmt: skip
            self.dice = gr.Button("New seed", elem_id="create-dice", min_width=100, scale=1)
        with gr.Accordion("Steps, guidance, size", open=False, elem_id="create-more"):
            self.steps = gr.Slider(1, 150, sample.steps, step=1, label="Steps",
                                   elem_id="create-steps")  # fmt: skip
            self.guidance = gr.Slider(
                0, 20, sample.guidance, step=0.1, label="Guidance (1: off)",
                elem_id="create-guidance",
            )  # fmt: skip
            with gr.Row():
                self.width = _side("Width in px (0: the base's own)", "create-width")
                self.height = _side("Height in px (0: the base's own)", "create-height")

    def connect(self, quiet: Mapping[str, Any]) -> None:
        """Connect what concerns the form alone; ``quiet``: keywords of its events."""
        self.dice.click(lambda: random.randrange(2**31), None, self.seed, **quiet)
        self.prompt.focus(self.studio.sampler.prepare, None, None, **quiet)

    # --- what is asked for

    def request(self, values: Values, owner: str) -> Request:
        """What the form asks for.

        Raises:
            UserError: naming what is missing or does not go together.
        """
        prompt = (values[self.prompt] or "").strip()
        if not prompt:
            raise UserError(f"prompt: write what to draw, such as “{example(None)}”")
        chosen = [self.studio.library.get(owner, id) for id in values[self.adapters] or []]
        _check_one_base(chosen)
        weights = self._weights(values)
        adapters = tuple(
            Weighted(one.path, weights.get(one.id, 1.0), one.id, one.name) for one in chosen
        )
        base = chosen[0].base if chosen else values[self.base]
        if not chosen and base not in bases():
            raise UserError("base model: choose one of the list")
        return Request(
            base=base,
            prompt=prompt,
            adapters=adapters,
            negative_prompt=(values[self.negative] or "").strip(),
            n=int(values[self.count]),
            seed=_whole(values[self.seed], "seed"),
            steps=int(values[self.steps]),
            guidance=float(values[self.guidance]),
            width_px=_whole(values[self.width], "width") or None,
            height_px=_whole(values[self.height], "height") or None,
        )

    def _weights(self, values: Values) -> dict[str, float]:
        """Strength of each adapter by its id, as the sliders have it."""
        sliders = [float(values[slider]) for slider in self.strengths]
        return dict(zip(values[self.order], sliders, strict=False))

    # --- what is shown

    def follow(self, values: Values, owner: str) -> Updates:
        """What follows from the adapters (or the base, where there are none) that were chosen."""
        known = {one.id: one for one in self.studio.library.all(owner)}
        chosen = [known[id] for id in values[self.adapters] or [] if id in known]
        return self._chosen(chosen, self._weights(values), values[self.base], values[self.basis])

    def refreshed(self, values: Values, owner: str) -> Updates:
        """The adapters that there are by now; what follows, where one that was chosen is gone."""
        library = self.studio.library.all(owner)
        known = {one.id for one in library}
        ids = [id for id in values[self.adapters] or [] if id in known]
        updates = self.follow(values, owner) if ids != values[self.order] else {}
        return updates | self._offered(library, ids)

    def restored(self, settings: PictureSettings, owner: str) -> Updates:
        """The form as a picture's settings say."""
        library = self.studio.library.all(owner)
        known = {one.id: one for one in library}
        chosen = [known[one.id] for one in settings.adapters if one.id in known]
        missing = [one.name or one.id for one in settings.adapters if one.id not in known]
        if missing:
            gr.Warning(
                as_text(f"not among your adapters: {', '.join(missing)}; the rest was filled in")
            )
        weights = {one.id: max(-2.0, min(2.0, one.weight)) for one in settings.adapters}
        base = config_of(settings.base) or "mini"
        updates = self._chosen(chosen, weights, base, chosen[0].base if chosen else base)
        updates[self.base] = gr.update(value=base, visible=not chosen)
        updates[self.prompt] = gr.update(
            value=settings.prompt, placeholder=example(chosen[0] if chosen else None)
        )
        return updates | {
            **self._offered(library, [one.id for one in chosen]),
            self.negative: settings.negative_prompt,
            self.count: 1,
            self.seed: settings.seed,
            self.steps: settings.steps,
            self.guidance: settings.guidance,
            self.width: settings.width,
            self.height: settings.height,
        }

    def _offered(self, library: Sequence[AdapterView], chosen: Sequence[str]) -> Updates:
        return {
            self.adapters: gr.update(
                choices=[(one.name, one.id) for one in library], value=chosen, visible=bool(library)
            ),
            self.empty: gr.update(visible=not library),
        }

    def _chosen(
        self,
        chosen: Sequence[AdapterView],
        weights: Mapping[str, float],
        base: str,
        basis: str,
    ) -> Updates:
        drawn_on = chosen[0].base if chosen else base
        updates: Updates = {
            self.base: gr.update(visible=not chosen),
            self.prompt: gr.update(placeholder=example(chosen[0] if chosen else None)),
            self.order: [one.id for one in chosen],
            self.basis: drawn_on,
        }
        for index, slider in enumerate(self.strengths):
            if index < len(chosen):
                one = chosen[index]
                updates[slider] = gr.update(
                    visible=True, label=f"Strength of {one.name}", value=weights.get(one.id, 1.0)
                )
            else:
                updates[slider] = gr.update(visible=False, value=1.0)
        if drawn_on != basis:  # a person's own numbers stay while the base stays
            sample = defaults(config_of(drawn_on) or "sd15").sample
            updates[self.steps], updates[self.guidance] = sample.steps, sample.guidance
        return updates


def _check_one_base(chosen: Sequence[AdapterView]) -> None:
    for other in chosen[1:]:
        if other.base != chosen[0].base:
            raise UserError(
                f"{chosen[0].name} was trained on {base_label(chosen[0].base)} and "
                f"{other.name} on {base_label(other.base)}; choose adapters of one base model"
            )


def _side(label: str, elem_id: str) -> gr.Number:
    return gr.Number(
        0, label=label, precision=0, minimum=0, maximum=SIDE_AT_MOST_PX, step=8,
        elem_id=elem_id, min_width=140,
    )  # fmt: skip


def _whole(value: Any, name: str) -> int:
    if value is None:
        raise UserError(f"{name}: missing; give a whole number")
    return int(value)
