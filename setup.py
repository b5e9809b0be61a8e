"""The one thing pyproject.toml cannot say: the top-level configs/ travels inside the package."""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["nora_diffusion*", "webui*"]), "nora_diffusion.configs"],
    package_dir={"nora_diffusion.configs": "configs"},
    package_data={
        "nora_diffusion": ["assets/**/*", "**/*.toml", "**/*.html"],
        "nora_diffusion.configs": ["**/*.toml", "**/*.yaml"],
        "webui": ["migrations/*.mako"],
    },
)
