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


def without_trigger(prompt: str, class_name: str) -> str:
    """The prompt as it names any member of the class."""
    filled = prompt.replace("{trigger}", "").replace("{class_name}", class_name)
    return " ".join(filled.split())
