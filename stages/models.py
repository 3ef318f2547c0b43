"""Language models: looked at by their configuration first, then loaded only as deep as needed.

`inspect_model` reads config.json and nothing else, so that bad input is found before anything big
is read. `load_truncated` builds the model with fewer layers and no head; the weights of the other
layers are neither read nor held. `load_full` builds all of it, for what needs the loss. Code that a
checkpoint brings along is never run.
"""

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import huggingface_hub
import huggingface_hub.errors as hub_errors
import torch
import transformers
from safetensors import SafetensorError
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from ..storage.errors import InputError, NetworkError
from ..storage.files import file_digest, json_digest
from .hooks import HookedModel, check_model, locate_blocks
from .hub_repo import hub_is_reachable
from .model_names import resolve_model
from .taps import HOOKS

_WEIGHT_GLOBS = ("*.safetensors", "pytorch_model*.bin")


@dataclass(frozen=True, kw_only=True)
class ModelInfo:
    """What the configuration tells of a model, and where the model lies."""

    source: str  # a folder or a Hub id
    commit: str | None  # of the Hub's repository; None for a folder
    architecture: str  # as the configuration names it, for example gpt_neox
    n_layers: int
    d_model: int
    max_context: int | None  # None: the architecture sets no limit
    dtype: str | None  # of the checkpoint; None: the configuration does not say
    config: Any = field(repr=False, compare=False)

    @cached_property
    def revision(self) -> str:
        """What pins the model: the Hub's commit hash, or a digest of a folder's files.

        The digest of a folder reads all its weights, once, when it is first asked for. It is the
        SHA-256 of the canonical JSON of {file name: SHA-256} over config.json and the weight files.
        """
        if self.commit is not None:
            return self.commit
        folder = Path(self.source)
        files = [folder / "config.json", *_weight_files(folder)]
        return "sha256:" + json_digest({file.name: file_digest(file) for file in files})


def inspect_model(name: str, revision: str | None = None) -> ModelInfo:
    """Find a model and read its configuration. `revision` is a branch, tag or commit of the Hub."""
    source = resolve_model(name)
    folder = Path(source)
    is_folder = folder.is_dir()
    if is_folder and revision is not None:
        raise InputError(
            f"Model {source} is a local folder, which has no revision {revision!r}. "
            "Leave --revision out, or pass a Hub id."
        )
    if is_folder and not (folder / "config.json").is_file():
        raise InputError(
            f"Folder {source} holds no config.json, so it is not a model. "
            "Pass the folder that a model was saved to."
        )
    if is_folder and not _weight_files(folder):
        raise InputError(
            f"Folder {source} holds a config.json but no weights (*.safetensors or "
            "pytorch_model*.bin). Pass a folder with both."
        )
    config_file = folder / "config.json" if is_folder else _hub_config_file(source, revision)
    config = _read_config(source, config_file)
    text_config = config.get_text_config(decoder=True)
    dtype = text_config.dtype or config.dtype
    return ModelInfo(
        source=source,
        # The Hub's cache is .../snapshots/<commit>/config.json whatever revision was asked for.
        commit=None if is_folder else config_file.parent.name,
        architecture=text_config.model_type,
        n_layers=text_config.num_hidden_layers,
        d_model=text_config.hidden_size,
        max_context=getattr(text_config, "max_position_embeddings", None),
        dtype=None if dtype is None else str(dtype).removeprefix("torch."),
        config=config,
    )


def check_layer(info: ModelInfo, layers: Sequence[int], hook: str) -> None:
    """Refuse layers and hooks that the model does not have."""
    if hook not in HOOKS:
        raise InputError(f"Hook {hook!r} is not known. Pass one of {', '.join(HOOKS)}.")
    for layer in layers:
        if not 0 <= layer < info.n_layers:
            raise InputError(
                f"Model {info.source} has {info.n_layers} layers, counted from 0, but layer "
                f"{layer} was asked for. Pass --layer from 0 to {info.n_layers - 1}."
            )
    if len(layers) == 0:
        raise InputError(f"No layer was asked for. Pass --layer from 0 to {info.n_layers - 1}.")


def load_truncated(
    info: ModelInfo, layers: Sequence[int], hook: str, device: torch.device, dtype: torch.dtype
) -> HookedModel:
    """The model up to its deepest hooked block, ready to run, in eval mode."""
    check_layer(info, layers, hook)
    config = _truncated_config(info.config, max(layers) + 1)
    wrapper = _load(info, transformers.AutoModel, config, dtype)
    is_text_only = config.get_text_config(decoder=True) is config
    # Of a model that also sees or hears, only the text decoder is kept.
    decoder = (wrapper if is_text_only else wrapper.get_decoder()).to(device)
    model = _hooked(info, config, decoder, layers, hook, device, dtype)
    check_model(model, info.source)
    return model


@dataclass(frozen=True, kw_only=True)
class FullModel:
    """A language model with all of its blocks and its head; hooked: its decoder, with one hook."""

    hooked: HookedModel
    lm: Any = field(repr=False)
    source: str


def load_full(
    info: ModelInfo, layer: int, hook: str, device: torch.device, dtype: torch.dtype
) -> FullModel:
    """The whole model with its head, ready to run, in eval mode."""
    check_layer(info, [layer], hook)
    config = _truncated_config(info.config, info.n_layers)
    lm = _load(info, transformers.AutoModelForCausalLM, config, dtype).to(device)
    hooked = _hooked(info, config, lm.get_decoder(), [layer], hook, device, dtype)
    check_model(hooked, info.source)
    return FullModel(hooked=hooked, lm=lm, source=info.source)


def _load(info: ModelInfo, kind: Any, config: Any, dtype: torch.dtype) -> Any:
    """The model of a kind (one of Transformers' automatic classes), with all of its weights."""
    with _quiet_transformers():
        wrapper, report = _read_weights(info, kind, config, dtype)
    missing = sorted(report["missing_keys"]) + [str(key) for key in report["mismatched_keys"]]
    if missing:
        raise InputError(
            f"Model {info.source} lacks {len(missing)} of the weights that its configuration "
            f"calls for, the first being {missing[0]}. Its files are incomplete or belong to "
            "another model; fetch it again."
        )
    return wrapper.eval().requires_grad_(False)


def _hooked(
    info: ModelInfo,
    config: Any,
    decoder: Any,
    layers: Sequence[int],
    hook: str,
    device: torch.device,
    dtype: torch.dtype,
) -> HookedModel:
    return HookedModel(
        decoder=decoder,
        blocks=locate_blocks(decoder, config.get_text_config(decoder=True).num_hidden_layers),
        layers=tuple(sorted(set(layers))),
        hook=hook,
        d_model=info.d_model,
        device=device,
        dtype=dtype,
    )


def _weight_files(folder: Path) -> list[Path]:
    """The weight files in the format that would be read: safetensors where there are any."""
    for pattern in _WEIGHT_GLOBS:
        files = sorted(folder.glob(pattern))
        if files:
            return files
    return []


def _hub_config_file(source: str, revision: str | None) -> Path:
    """The Hub's config.json, from the cache of earlier downloads or fetched now."""
    offline = not hub_is_reachable()
    at = source if revision is None else f"{source} at revision {revision}"
    try:
        return Path(
            huggingface_hub.hf_hub_download(
                source, "config.json", revision=revision, local_files_only=offline
            )
        )
    except hub_errors.GatedRepoError as error:
        raise InputError(
            f"Model {source} is gated. Accept its terms at https://huggingface.co/{source}, run "
            "`hf auth login`, and try again."
        ) from error
    except (hub_errors.RepositoryNotFoundError, hub_errors.HFValidationError) as error:
        raise InputError(
            f"Model {source} was not found: it is neither a local folder nor on the Hub (or it is "
            "private, and `hf auth login` is needed). Check the spelling."
        ) from error
    except hub_errors.RevisionNotFoundError as error:
        raise InputError(
            f"Model {source} has no revision {revision!r} on the Hub. Pass a branch, a tag or a "
            f"commit listed at https://huggingface.co/{source}/commits/main."
        ) from error
    except hub_errors.RemoteEntryNotFoundError as error:
        raise InputError(
            f"Model {at} has no config.json on the Hub, so it is not a model in the Transformers "
            "format. Pass another one."
        ) from error
    except (OSError, hub_errors.FileMetadataError) as error:
        raise _no_network(source, at) from error


def _no_network(source: str, at: str) -> NetworkError:
    return NetworkError(
        f"Model {at} could not be fetched from the Hub: no network, or the Hub does not answer. "
        f"Fetch it on a machine that has network with `hf download {source} --local-dir DIR`, copy "
        "DIR here and pass --model DIR."
    )


def _read_config(source: str, config_file: Path) -> Any:
    """The configuration, refused unless it is of a decoder that Transformers itself can build."""
    try:
        raw, _ = transformers.PretrainedConfig.get_config_dict(config_file.parent)
    except OSError as error:
        raise InputError(
            f"The config.json of model {source} is not valid JSON. Fetch the model again."
        ) from error
    kind = raw.get("model_type")
    if kind not in transformers.CONFIG_MAPPING:
        if "auto_map" in raw:
            raise InputError(
                f"Model {source} needs code of its own to run, and code from a checkpoint is never "
                "run here. Pass a model of an architecture that Transformers contains."
            )
        raise InputError(
            f"Model {source} is of type {kind!r}, which Transformers {transformers.__version__} "
            "does not know. Pass another model, or install a newer Transformers."
        )
    if raw.get("is_encoder_decoder") or kind not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raise InputError(
            f"Model {source} is of type {kind!r}, which is not a decoder-only language model. "
            "Pass one that is, such as a GPT-NeoX, GPT-2, Gemma, Llama or Qwen model."
        )
    if "quantization_config" in raw:
        raise InputError(
            f"Model {source} is quantised, and its activations would be those of the quantised "
            "weights. Pass the unquantised model."
        )
    return transformers.AutoConfig.from_pretrained(config_file.parent, trust_remote_code=False)


def _truncated_config(config: Any, n_blocks: int) -> Any:
    """A copy of the configuration with fewer layers, also in whatever it lists by layer."""
    truncated = copy.deepcopy(config)
    text_config = truncated.get_text_config(decoder=True)
    n_layers = text_config.num_hidden_layers
    if getattr(text_config, "num_kv_shared_layers", 0):
        n_blocks = n_layers  # which layers share keys is counted from the last; keep them all
    for name, value in vars(text_config).items():
        # Only a list by layer matters in a base model; of token ids none are used there.
        if isinstance(value, list | tuple) and len(value) == n_layers:
            setattr(text_config, name, value[:n_blocks])
    text_config.num_hidden_layers = n_blocks
    text_config.use_cache = False
    # A pad id makes Transformers look for padding in each batch and warn. It changes no activation:
    # in an embedding it only stops a gradient.
    text_config.pad_token_id = None
    return truncated


def _read_weights(
    info: ModelInfo, kind: Any, config: Any, dtype: torch.dtype
) -> tuple[Any, dict[str, Any]]:
    """The model and what was missing. Tensors that it has no place for are not read."""
    model_class = kind._model_mapping[type(config)]
    try:
        model, report = model_class.from_pretrained(
            info.source,
            config=config,
            revision=info.commit or "main",
            dtype=dtype,
            # Gemma 2 soft-caps its attention scores, which sdpa cannot.
            attn_implementation="sdpa" if model_class._supports_sdpa else "eager",
            output_loading_info=True,
            weights_only=True,  # where there are no safetensors
        )
    except (OSError, hub_errors.HfHubHTTPError) as error:
        if info.commit is not None:
            raise _no_network(info.source, info.source) from error
        raise _unreadable(info) from error
    except (SafetensorError, RuntimeError) as error:
        raise _unreadable(info) from error
    return model, report


def _unreadable(info: ModelInfo) -> InputError:
    return InputError(
        f"The weights of model {info.source} could not be read with its config.json: they are "
        "damaged, incomplete or of another shape. Fetch the model again."
    )


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """No progress bar and no report of the unused weights: that some are left out is the point."""
    log = transformers.utils.logging
    verbosity, has_bar = log.get_verbosity(), log.is_progress_bar_enabled()
    log.set_verbosity_error()
    log.disable_progress_bar()
    try:
        yield
    finally:
        log.set_verbosity(verbosity)
        if has_bar:
            log.enable_progress_bar()
