"""mini's tokenizer and text encoder: CLIP's architecture, small, with a vocabulary of its own.

The vocabulary is byte-level, so any prompt encodes; merges are learnt from the recipe's captions.
"""

from pathlib import Path
from random import Random

from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from nora_diffusion.mini.backgrounds import COLOURS, SCENES
from nora_diffusion.mini.sources import Concept

MAX_LENGTH = 32
WIDTH = 192
_WORDS = (
    "a an the of on in at with and or photo picture image drawing close view small tiny big large "
    "background gradient stripes checks sitting standing next to front behind under over toy sks"
).split()


def build_tokenizer(concepts: list[Concept], folder: Path, vocabulary: int = 2048) -> CLIPTokenizer:
    """Learns merges from the words of the captions and saves a `CLIPTokenizer` to `folder`.

    What is saved there already is returned as it is: pairs that are equally frequent get their
    ranks in no fixed order, and weights belong to the ids that they were trained with.
    """
    if (folder / "tokenizer.json").exists():
        return CLIPTokenizer.from_pretrained(folder)
    corpus = [*_WORDS, *COLOURS, *SCENES, "background"]
    corpus += [c.noun for c in concepts] + [c.class_name for c in concepts]
    random = Random(0)
    random.shuffle(corpus)
    tokenizer = Tokenizer(models.BPE(end_of_word_suffix="</w>", unk_token="<|endoftext|>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary - 2 - len(alphabet),
        initial_alphabet=alphabet,
        end_of_word_suffix="</w>",
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus * 2, trainer)
    folder.mkdir(parents=True, exist_ok=True)
    learnt = tokenizer.model.save(str(folder))
    merges = _read_merges(Path(learnt[1]))
    # CLIP's own order: single bytes, bytes that end a word, merged pairs, start and end tokens.
    pieces = alphabet + [f"{b}</w>" for b in alphabet]
    pieces += [p for p in dict.fromkeys(a + b for a, b in merges) if p not in set(pieces)]
    pieces += ["<|startoftext|>", "<|endoftext|>"]
    vocab = {piece: i for i, piece in enumerate(pieces)}
    made = CLIPTokenizer(
        vocab=vocab,
        merges=merges,  # pyright: ignore[reportArgumentType]  # pairs, as saved
        model_max_length=MAX_LENGTH,
        pad_token="<|endoftext|>",
    )
    for leftover in learnt:
        Path(leftover).unlink()
    made.save_pretrained(folder)
    return made


def _read_merges(path: Path) -> list[tuple[str, str]]:
    lines = path.read_text(encoding="utf-8").splitlines()
    pairs = [tuple(line.split(" ")) for line in lines if line and not line.startswith("#version")]
    return [(a, b) for a, b in pairs]


def build_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """Returns the untrained text encoder: token ids (B, 32) -> hidden states (B, 32, 192)."""
    vocab = tokenizer.get_vocab()
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        intermediate_size=4 * WIDTH,
        num_hidden_layers=3,
        num_attention_heads=6,
        max_position_embeddings=MAX_LENGTH,
        hidden_act="quick_gelu",
        projection_dim=WIDTH,
        bos_token_id=vocab["<|startoftext|>"],
        eos_token_id=vocab["<|endoftext|>"],
        pad_token_id=vocab["<|endoftext|>"],
        attention_dropout=0.0,
    )
    return CLIPTextModel(config)
