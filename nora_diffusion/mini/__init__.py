"""The built-in base model: data, training recipe, export and score of `mini`.

Run it with ``python -m nora_diffusion.mini``; see `nora_diffusion.mini.__main__` for the stages.
Nothing here is needed to *use* mini: its weights are an ordinary diffusers folder under assets/.
"""
