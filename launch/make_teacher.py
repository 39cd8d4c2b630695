"""Train a tiny CLIP on handwritten digits, to stand at toy scale for the teacher that the report takes (EVA02-CLIP-E):

    python launch/make_teacher.py OUT              about a minute on one core

Writes OUT as a Hugging Face folder of a CLIPModel: config.json, model.safetensors, preprocessor_config.json and the
tokenizer of toy shards.  Images are digits on paper, of training scans only; texts are short captions.  An image's
embedding and the mean of its patches' features are both matched with the captions of all ten digits, so that a patch's
feature, after the final norm and the projection, says what is on the paper around it.  Prints the share of held-out
scans whose digit is told right from captions.
"""

import argparse
import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tokenizers
import torch
import torch.nn.functional as F
from PIL import Image
from tokenizers.processors import TemplateProcessing

if not __package__:  # run as a file of a checkout, which need not be installed
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tandem.data.media.text import EOS, PAD, Tokenizer, build_byte_tokenizer
from tandem.data.synthesis.images import WORDS
from tandem.data.synthesis.maker import load_sources
from tandem.data.synthesis.once import made_once
from tandem.data.synthesis.vision import DIGITS, VisionTasks

VERSION = 1  # of the teacher: another one is another teacher, whatever the arguments
STEPS, BATCH, LEARNING_RATE, WARMUP = 800, 64, 1e-3, 40
SIDE, GRID, WIDTH, DEPTH, HEADS, EMBEDDING = 56, 4, 96, 3, 4, 64
TEXT_WIDTH, TEXT_DEPTH, TEXT_HEADS, MAX_TOKENS = 64, 2, 4, 64
TRAIN_DRAWINGS, HELDOUT_DRAWINGS = 10_000, 1077  # a held-out scan is drawn three times
THREADS = 1  # whatever the machine has: sums, hence weights, depend on it, and more threads gain little at this size
POSITION_STD = 0.3  # of first position embeddings: the library's 0.02 drowns in patches here
MEAN = STD = (0.5, 0.5, 0.5)


@dataclass(frozen=True)
class Digits:
    """Images uint8 [I, 3, SIDE, SIDE] and the digit that each shows, int64 [I]."""

    pixels_I3HW: torch.Tensor
    label_I: torch.Tensor

    def normalised(self, picked_B: torch.Tensor) -> torch.Tensor:
        return (self.pixels_I3HW[picked_B].float() / 255 - MEAN[0]) / STD[0]


def draw_digits(split: str, count: int, seed: int) -> Digits:
    """`count` drawings of one scan each, squeezed to a square as preprocessor_config.json says."""
    sources = load_sources()
    maker = VisionTasks(sources, split, np.random.default_rng([seed, split == "heldout"]))
    images, labels = [], []
    for _ in range(count):
        scan, _ = maker.next_scan()
        pixels, _ = maker.digits_in_a_row(1, [scan])
        image = Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))
        images.append(np.asarray(image.resize((SIDE, SIDE), Image.Resampling.BILINEAR)))
        labels.append(sources.labels[scan])
    pixels_I3HW = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous()
    return Digits(pixels_I3HW, torch.tensor(np.array(labels)))


class Captions:
    """The captions of toy shards for every digit as token ids, each ended by <eos> and padded to the longest."""

    def __init__(self, tokenizer: Tokenizer):
        texts = [[caption.format(word) for word in WORDS[:10]] for caption in DIGITS]
        ids = [[[*tokenizer.encode_text(text), tokenizer.eos_id] for text in ten] for ten in texts]
        longest = max(len(one) for ten in ids for one in ten)
        if longest > MAX_TOKENS:
            raise ValueError(f"the longest caption has {longest} tokens; the text side takes {MAX_TOKENS}")
        padded = [[one + [tokenizer.pad_id] * (longest - len(one)) for one in ten] for ten in ids]
        self.tokens_C10T = torch.tensor(padded)
        self.real_C10T = (self.tokens_C10T != tokenizer.pad_id).long()


def build(tokenizer: Tokenizer):
    """A CLIPModel with random weights."""
    from transformers import CLIPConfig, CLIPModel

    vision = {
        "hidden_size": WIDTH,
        "intermediate_size": 4 * WIDTH,
        "num_hidden_layers": DEPTH,
        "num_attention_heads": HEADS,
        "projection_dim": EMBEDDING,
        "image_size": SIDE,
        "patch_size": SIDE // GRID,
    }
    text = {
        "hidden_size": TEXT_WIDTH,
        "intermediate_size": 4 * TEXT_WIDTH,
        "num_hidden_layers": TEXT_DEPTH,
        "num_attention_heads": TEXT_HEADS,
        "projection_dim": EMBEDDING,
        "vocab_size": tokenizer.vocab_size,
        "max_position_embeddings": MAX_TOKENS,
        "pad_token_id": tokenizer.pad_id,
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_id,
    }
    model = CLIPModel(CLIPConfig(vision_config=vision, text_config=text, projection_dim=EMBEDDING))
    torch.nn.init.normal_(model.vision_model.embeddings.position_embedding.weight, std=POSITION_STD)
    return model


def embed_images(model, pixels_B3HW: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Unit embeddings [B, E]: of the class token, and of the mean over the features of all patches."""
    hidden_B1N = model.vision_model(pixel_values=pixels_B3HW).last_hidden_state
    features_B1NE = model.visual_projection(model.vision_model.post_layernorm(hidden_B1N))
    return F.normalize(features_B1NE[:, 0], dim=-1), F.normalize(features_B1NE[:, 1:].mean(1), dim=-1)


def embed_texts(model, tokens_BT: torch.Tensor, real_BT: torch.Tensor) -> torch.Tensor:
    """Unit embeddings [B, E] of captions, read at <eos>."""
    pooled_BD = model.text_model(input_ids=tokens_BT, attention_mask=real_BT).pooler_output
    return F.normalize(model.text_projection(pooled_BD), dim=-1)


def train(model, captions: Captions, steps: int, seed: int) -> float:
    """The last loss: cross-entropy of both image embeddings over the captions of the ten digits, one wording a step."""
    digits = draw_digits("train", min(TRAIN_DRAWINGS, steps * BATCH), seed)
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.05)
    model.train()
    for step in range(steps):
        rate = min(1.0, (step + 1) / WARMUP) * 0.5 * (1 + np.cos(np.pi * step / steps))
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * rate
        picked_B = torch.randint(len(digits.label_I), (BATCH,), generator=generator)
        wording = int(torch.randint(len(DIGITS), (), generator=generator))
        text_10E = embed_texts(model, captions.tokens_C10T[wording], captions.real_C10T[wording])
        scale, label_B = model.logit_scale.exp(), digits.label_I[picked_B]
        views = embed_images(model, digits.normalised(picked_B))
        losses = [F.cross_entropy(scale * view_BE @ text_10E.T, label_B) for view_BE in views]
        loss = torch.stack(losses).sum()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    return float(loss.detach())


@torch.inference_mode()
def heldout_accuracy(model, captions: Captions, seed: int) -> tuple[float, float]:
    """Zero-shot accuracy on drawings of held-out scans, by the class token and by the mean of the patches."""
    model.eval()
    digits = draw_digits("heldout", HELDOUT_DRAWINGS, seed)
    pairs = zip(captions.tokens_C10T, captions.real_C10T, strict=True)
    text_10E = torch.stack([embed_texts(model, *pair) for pair in pairs]).mean(0)
    views = embed_images(model, digits.normalised(torch.arange(HELDOUT_DRAWINGS)))
    right = [((view_IE @ text_10E.T).argmax(-1) == digits.label_I).double().mean() for view_IE in views]
    return float(right[0]), float(right[1])


def write(model, tokenizer: Tokenizer, folder: Path) -> None:
    """The model, how images are prepared, and the tokenizer in such a way that transformers ends a text with <eos>."""
    model.save_pretrained(folder)
    ending = tokenizers.Tokenizer.from_file(tokenizer.path)
    ending.post_processor = TemplateProcessing(single=f"$A {EOS}", special_tokens=[(EOS, tokenizer.eos_id)])
    ending.save(tokenizer.path)
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": EOS, "pad_token": PAD}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"model_max_length": MAX_TOKENS}) + "\n")
    preparation = {
        "image_processor_type": "CLIPImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"height": SIDE, "width": SIDE},
        "resample": int(Image.Resampling.BILINEAR),
        "do_center_crop": False,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(MEAN),
        "image_std": list(STD),
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(preparation, indent=2) + "\n")


def make_teacher(out: str | Path, steps: int = STEPS, seed: int = 0) -> dict | None:
    """Trains and writes the teacher; returns its scores, or None where the same teacher is there already.

    Raises ValueError where `out` holds anything else, for steps < 1, and where transformers is missing.
    """
    out, made = Path(out), {"version": VERSION, "steps": steps, "seed": seed}
    if steps < 1:
        raise ValueError(f"--steps is {steps}; it must be at least 1")
    with made_once(out, made, "a teacher") as partial:
        if partial is None:
            return None
        try:
            import transformers
        except ImportError as error:
            sentence = "a teacher needs transformers, which is not installed: pip install 'tandem[hf]'"
            raise ValueError(sentence) from error
        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()

        build_byte_tokenizer(partial / "tokenizer.json")
        tokenizer = Tokenizer(partial / "tokenizer.json")
        torch.manual_seed(seed)
        model, captions, begin = build(tokenizer), Captions(tokenizer), time.perf_counter()
        loss = train(model, captions, steps, seed)
        by_image, by_patches = heldout_accuracy(model, captions, seed)
        write(model, tokenizer, partial)
    return {"loss": loss, "image": by_image, "patches": by_patches, "seconds": time.perf_counter() - begin}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", help="folder to write; must not exist, or be empty, or be made by the same arguments")
    parser.add_argument("--steps", type=int, default=STEPS, help=f"updates of {BATCH} images; default {STEPS}")
    parser.add_argument("--seed", type=int, default=0, help="of the weights, of the drawings and of their order")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(THREADS)
    try:
        scores = make_teacher(arguments.out, arguments.steps, arguments.seed)
    except ValueError as error:
        parser.exit(2, f"error: {error}\n")
    if scores is None:
        print(f"{arguments.out}: already made with these arguments; nothing to do")
        return 0
    print(
        f"{arguments.out}: {arguments.steps} steps in {scores['seconds']:.0f} s, loss {scores['loss']:.3f}; digits of "
        f"held-out scans told from captions: {scores['image']:.1%} by image, {scores['patches']:.1%} by mean of patches"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
