"""The prompts of the DreamBooth protocol: 25 a kind of subject."""

from typing import Literal

Kind = Literal["mini", "object", "live"]

MINI = (
    "a photo of a {trigger} {class_name} in the grass",
    "a photo of a {trigger} {class_name} on the beach",
    "a photo of a {trigger} {class_name} in the snow",
    "a photo of a {trigger} {class_name} in the night sky",
    "a photo of a {trigger} {class_name} on a wooden table",
    "a photo of a {trigger} {class_name} in the water",
    "a photo of a {trigger} {class_name} in the city",
    "a photo of a {trigger} {class_name} in the mountains",
    "a photo of a {trigger} {class_name} in autumn leaves",
    "a photo of a {trigger} {class_name} indoors",
    "a photo of a {trigger} {class_name} on a red background",
    "a photo of a {trigger} {class_name} on a orange background",
    "a photo of a {trigger} {class_name} on a yellow background",
    "a photo of a {trigger} {class_name} on a green background",
    "a photo of a {trigger} {class_name} on a teal background",
    "a photo of a {trigger} {class_name} on a blue background",
    "a photo of a {trigger} {class_name} on a purple background",
    "a photo of a {trigger} {class_name} on a pink background",
    "a photo of a {trigger} {class_name} on a brown background",
    "a photo of a {trigger} {class_name} on a black background",
    "a photo of a {trigger} {class_name} on a white background",
    "a photo of a {trigger} {class_name} on a grey background",
    "an image of a {trigger} {class_name} on the beach",
    "a big {trigger} {class_name} in the snow",
    "a picture of a {trigger} {class_name} on blue and white stripes",
)
"""What mini can draw; the grammar is that of its training captions."""


_PLACES = (
    "a {trigger} {class_name} in the jungle",
    "a {trigger} {class_name} in the snow",
    "a {trigger} {class_name} on the beach",
    "a {trigger} {class_name} on a cobblestone street",
    "a {trigger} {class_name} on top of pink fabric",
    "a {trigger} {class_name} on top of a wooden floor",
    "a {trigger} {class_name} with a city in the background",
    "a {trigger} {class_name} with a mountain in the background",
    "a {trigger} {class_name} with a blue house in the background",
    "a {trigger} {class_name} on top of a purple rug in a forest",
)
_LOOKS = (
    "a red {trigger} {class_name}",
    "a purple {trigger} {class_name}",
    "a shiny {trigger} {class_name}",
    "a wet {trigger} {class_name}",
    "a cube shaped {trigger} {class_name}",
)
OBJECT = (
    *_PLACES,
    "a {trigger} {class_name} with a wheat field in the background",
    "a {trigger} {class_name} with a tree and autumn leaves in the background",
    "a {trigger} {class_name} with the Eiffel Tower in the background",
    "a {trigger} {class_name} floating on top of water",
    "a {trigger} {class_name} floating in an ocean of milk",
    "a {trigger} {class_name} on top of green grass with sunflowers around it",
    "a {trigger} {class_name} on top of a mirror",
    "a {trigger} {class_name} on top of the sidewalk in a crowded street",
    "a {trigger} {class_name} on top of a dirt road",
    "a {trigger} {class_name} on top of a white rug",
    *_LOOKS,
)
"""Of DreamBench (Ruiz et al. 2023, the DreamBooth dataset, CC BY 4.0), for objects."""

LIVE = (
    *_PLACES,
    "a {trigger} {class_name} wearing a red hat",
    "a {trigger} {class_name} wearing a santa hat",
    "a {trigger} {class_name} wearing a rainbow scarf",
    "a {trigger} {class_name} wearing a black top hat and a monocle",
    "a {trigger} {class_name} in a chef outfit",
    "a {trigger} {class_name} in a firefighter outfit",
    "a {trigger} {class_name} in a police outfit",
    "a {trigger} {class_name} wearing pink glasses",
    "a {trigger} {class_name} wearing a yellow shirt",
    "a {trigger} {class_name} in a purple wizard outfit",
    *_LOOKS,
)
"""Of DreamBench, for animals and people."""

PROMPTS: dict[Kind, tuple[str, ...]] = {"mini": MINI, "object": OBJECT, "live": LIVE}


def without_trigger(prompt: str, class_name: str) -> str:
    """The prompt as it names any member of the class."""
    filled = prompt.replace("{trigger}", "").replace("{class_name}", class_name)
    return " ".join(filled.split())
