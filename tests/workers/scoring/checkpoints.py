"""Small random checkpoints of every audio-classification architecture, saved as on the hub."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
import transformers

from earmark.core import errors, settings
from workers.scoring import classifier

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

RATE = 16_000
LABELS = {0: "bell", 1: "dog", 2: "rain", 3: "siren", 4: "speech"}

#: Common to the wav2vec2 family: strides and kernels give the usual 20 ms, with few channels.
_FAMILY: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "conv_dim": (16, 16, 24),
    "conv_kernel": (10, 8, 8),
    "conv_stride": (5, 8, 8),
    "num_feat_extract_layers": 3,
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 4,
    "classifier_proj_size": 24,
    "vocab_size": 16,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_LAYER_NORM = {"feat_extract_norm": "layer", "conv_bias": True}
_SPECTROGRAM: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "vocab_size": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def _waveforms(*, mask: bool) -> transformers.Wav2Vec2FeatureExtractor:
    return transformers.Wav2Vec2FeatureExtractor(do_normalize=True, return_attention_mask=mask)


def _family(kind: str, *, mask: bool = False, **changes: Any) -> tuple[Any, Any]:
    config = getattr(transformers, f"{kind}Config")(**{**_FAMILY, **changes}, id2label=LABELS)
    return getattr(transformers, f"{kind}ForSequenceClassification")(config), _waveforms(mask=mask)


def _ast() -> tuple[Any, Any]:
    config = transformers.ASTConfig(
        **_SPECTROGRAM, max_length=1024, frequency_stride=64, time_stride=64, id2label=LABELS
    )
    return transformers.ASTForAudioClassification(config), transformers.ASTFeatureExtractor()


def _wav2vec2_bert() -> tuple[Any, Any]:
    config = transformers.Wav2Vec2BertConfig(
        **_SPECTROGRAM, feature_projection_input_dim=160, conv_depthwise_kernel_size=7,
        classifier_proj_size=24, output_hidden_size=32, id2label=LABELS,
    )  # fmt: skip
    return transformers.Wav2Vec2BertForSequenceClassification(
        config
    ), transformers.SeamlessM4TFeatureExtractor()


def _whisper() -> tuple[Any, Any]:
    config = transformers.WhisperConfig(
        d_model=32, encoder_layers=2, encoder_attention_heads=2, encoder_ffn_dim=48,
        decoder_layers=1, decoder_attention_heads=2, decoder_ffn_dim=48, vocab_size=64,
        classifier_proj_size=24, id2label=LABELS, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        decoder_start_token_id=1,
    )  # fmt: skip
    return transformers.WhisperForAudioClassification(
        config
    ), transformers.WhisperFeatureExtractor()


#: A maker for each architecture of `AutoModelForAudioClassification`, and for variants that batch
#: differently.
MAKERS: dict[str, Callable[[], tuple[Any, Any]]] = {
    "audio-spectrogram-transformer": _ast,
    "data2vec-audio": lambda: _family(
        "Data2VecAudio", mask=True, conv_pos_kernel_size=5, num_conv_pos_embeddings=2
    ),
    "hubert": lambda: _family("Hubert"),
    "hubert, layer norm": lambda: _family("Hubert", mask=True, **_LAYER_NORM),
    "sew": lambda: _family("SEW", squeeze_factor=2),
    "sew-d": lambda: _family(
        "SEWD", squeeze_factor=2, position_buckets=8, max_position_embeddings=64
    ),
    "unispeech": lambda: _family("UniSpeech"),
    "unispeech, layer norm": lambda: _family("UniSpeech", mask=True, **_LAYER_NORM),
    "unispeech-sat": lambda: _family("UniSpeechSat"),
    "unispeech-sat, layer norm": lambda: _family("UniSpeechSat", mask=True, **_LAYER_NORM),
    "wav2vec2": lambda: _family("Wav2Vec2"),
    "wav2vec2, layer norm": lambda: _family(
        "Wav2Vec2", mask=True, do_stable_layer_norm=True, **_LAYER_NORM
    ),
    "wav2vec2-bert": _wav2vec2_bert,
    "wav2vec2-conformer": lambda: _family(
        "Wav2Vec2Conformer", mask=True, position_embeddings_type="rotary", **_LAYER_NORM
    ),
    "wavlm": lambda: _family("WavLM"),
    "wavlm, layer norm": lambda: _family(
        "WavLM", mask=True, do_stable_layer_norm=True, **_LAYER_NORM
    ),
    "whisper": _whisper,
}


def save(name: str, folder: Path, **config_changes: Any) -> Path:
    """Save the small random checkpoint of this name, with scores spread as if it were trained."""
    torch.manual_seed(7)
    model, extractor = MAKERS[name]()
    _spread(model)
    model.config.update(config_changes)
    model.save_pretrained(folder)
    extractor.save_pretrained(folder)
    return folder


def _spread(model: Any) -> None:
    """Enlarge the classification head: a random one scores labels alike, hiding differences."""
    head = getattr(model.classifier, "dense", model.classifier)
    with torch.no_grad():
        head.weight.normal_(std=2.0)
        head.bias.normal_()


def save_ctc(folder: Path) -> Path:
    """Save a speech recogniser, which has no classification head."""
    torch.manual_seed(7)
    transformers.Wav2Vec2ForCTC(transformers.Wav2Vec2Config(**_FAMILY)).save_pretrained(folder)
    _waveforms(mask=False).save_pretrained(folder)
    return folder


def save_clap(folder: Path, *, fusion: bool = False) -> Path:
    """Save a CLAP checkpoint with a tokenizer of a few words."""
    torch.manual_seed(7)
    text = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
            "intermediate_size": 24, "pad_token_id": 1, "projection_dim": 16}  # fmt: skip
    audio = {"spec_size": 256, "patch_size": 8, "patch_stride": (8, 8), "num_mel_bins": 64,
             "hidden_size": 64, "depths": (1, 1), "num_attention_heads": (2, 2),
             "patch_embeds_hidden_size": 32, "projection_dim": 16, "window_size": 4,
             "enable_fusion": fusion}  # fmt: skip
    config = transformers.ClapConfig(text_config=text, audio_config=audio, projection_dim=16)
    transformers.ClapModel(config).save_pretrained(folder)
    truncation = "fusion" if fusion else "rand_trunc"
    transformers.ClapFeatureExtractor(truncation=truncation).save_pretrained(folder)
    _save_tokenizer(folder)
    return folder


def _save_tokenizer(folder: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = [
        "<s>",
        "<pad>",
        "</s>",
        "<unk>",
        "This",
        "is",
        "a",
        "sound",
        "of",
        ".",
        "dog",
        "barking",
        "piano",
        "siren",
    ]
    tokenizer = Tokenizer(
        models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
    ).save_pretrained(folder)


def edit_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def clip(seconds: float, *, rate: int = RATE, seed: int = 0) -> np.ndarray:
    """Return a chirp over noise, so that its windows differ in level and pitch."""
    generator = np.random.default_rng(seed)
    time_s = np.arange(round(seconds * rate)) / rate
    tone = np.sin(2 * np.pi * (200 + 40 * seed + 100 * time_s) * time_s) * (
        0.2 + 0.05 * np.sin(3 * time_s)
    )
    return (tone + 0.05 * generator.standard_normal(len(time_s))).astype(np.float32)


def scores(
    loaded: classifier.Classifier, windows: Sequence[np.ndarray], function: str | None = None
) -> np.ndarray:
    """Return scores (windows, labels) without a queue."""
    return _scored(loaded, windows, function or loaded.card.function_to_apply)


def logits(loaded: classifier.Classifier, windows: Sequence[np.ndarray]) -> np.ndarray:
    """Return logits (windows, labels) without a queue."""
    return _scored(loaded, windows, "none")


def _scored(
    loaded: classifier.Classifier, windows: Sequence[np.ndarray], function: str
) -> np.ndarray:
    """Score windows in the batches that the model chooses; raise the first ClipError."""
    found: dict[int, np.ndarray] = {}
    while waiting := [place for place in range(len(windows)) if place not in found]:
        batch = [
            waiting[place] for place in loaded.choose([len(windows[place]) for place in waiting])
        ]
        for place, outcome in zip(
            batch, loaded.outcomes([windows[each] for each in batch], function), strict=True
        ):
            if isinstance(outcome, errors.ClipError):
                raise outcome
            found[place] = outcome
    return np.stack([found[place] for place in range(len(windows))])


class Dimensions(torch.nn.Module):
    """A model of values, as the card of `audeering/wav2vec2-large-robust-12-ft-emotion-msp-dim`."""

    def __init__(self) -> None:
        super().__init__()
        self.config = transformers.Wav2Vec2Config(
            **_FAMILY, **_LAYER_NORM, do_stable_layer_norm=True, problem_type="regression",
            id2label={0: "arousal", 1: "dominance", 2: "valence"},
        )  # fmt: skip
        self.wav2vec2 = transformers.Wav2Vec2Model(self.config)
        self.classifier = torch.nn.Module()
        self.classifier.dense = torch.nn.Linear(32, 32)
        self.classifier.out_proj = torch.nn.Linear(32, 3)

    def forward(self, samples: torch.Tensor) -> torch.Tensor:
        mean = self.wav2vec2(samples).last_hidden_state.mean(dim=1)
        return self.classifier.out_proj(torch.tanh(self.classifier.dense(mean)))


def save_dimensions(folder: Path, **config_changes: Any) -> Dimensions:
    """Save a random model of this kind as a pickle, as its authors did."""
    torch.manual_seed(7)
    model = Dimensions().eval()
    with torch.no_grad():
        model.classifier.out_proj.weight.normal_(std=2.0)
    model.config.update(config_changes)
    model.config.save_pretrained(folder)
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    _waveforms(mask=True).save_pretrained(folder)
    return model


def load(folder: Path | str, labels: Sequence[str] = (), **changes: Any) -> classifier.Classifier:
    """Load a model on the CPU."""
    return classifier.load(settings.Model(name=str(folder), **{"device": "cpu", **changes}), labels)


def refusal(folder: Path | str, labels: Sequence[str] = (), **changes: Any) -> str:
    """Return the sentence with which a model is refused."""
    with pytest.raises(errors.ServiceError) as refused:
        load(folder, labels, **changes)
    return str(refused.value)
