"""Ways to damage a checkpoint folder: each takes the folder and a random generator, and says in a word what it did.

Every generator is seeded, so a case can be made again by its number.
"""

from __future__ import annotations

import json
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

CANARY = "CANARY-4711-that-must-not-leave"
_RAW = "\x00raw:"  # a value that json.dumps would not write: replaced in the text afterwards

Mutation = Callable[[Path, random.Random], str]

NUMBERS: tuple[Any, ...] = (
    *(0, 1, -1, 2, 3, 5, 7, 8, 16, 33, 64, 128, 999, 10_000, 2**31 - 1, 2**31, 2**32, 2**63 - 1, 2**63, 2**64),
    *(
        -(2**63),
        10**30,
        0.5,
        1.5,
        -0.5,
        1e-9,
        1e300,
        _RAW + "1e400",
        _RAW + "NaN",
        _RAW + "-Infinity",
        _RAW + "9" * 5000,
    ),
)
OTHERS: tuple[Any, ...] = (
    *(None, True, False, "", "x", "4", "llama", "../outside/secret.json", "/etc/passwd", "\ud800", "a\nb\x1b[31m"),
    *("x" * 5000, [], [1], [None], [4, 4], {}, {"a": 1}, {"rope_type": "linear"}, [[[[1]]]]),
)
TYPES = [
    "llama",
    "mistral",
    "qwen2",
    "gpt_neox",
    "gpt2",
    "t5",
    "mamba",
    "deepseek_v3",
    "bert",
    "llava",
    "gqa_t5",
    "nope",
    "whisper",
]
CLASSES = [
    "LlamaForCausalLM",
    "LlamaModel",
    "MistralForCausalLM",
    "BertModel",
    "pipeline",
    "AutoModel",
    "__name__",
    "LlamaForSequenceClassification",
    "T5ForConditionalGeneration",
    "GPT2LMHeadModel",
    "logging",
    "Nope",
]
FIELDS = [
    "num_key_value_heads",
    "num_attention_heads",
    "num_hidden_layers",
    "hidden_size",
    "head_dim",
    "vocab_size",
    "intermediate_size",
    "max_position_embeddings",
    "rope_theta",
    "rope_parameters",
    "rope_scaling",
    "attention_bias",
    "tie_word_embeddings",
    "dtype",
    "torch_dtype",
    "quantization_config",
    "auto_map",
    "transformers_weights",
    "architectures",
    "model_type",
    "text_config",
    "vision_config",
    "layer_types",
    "hidden_act",
    "is_encoder_decoder",
    "num_local_experts",
    "sliding_window",
    "multi_query",
    "d_kv",
    "num_heads",
    "pad_token_id",
    "rms_norm_eps",
    "use_cache",
    "attn_implementation",
    "_name_or_path",
    "transformers_version",
    "kv_lora_rank",
    "per_layer_config",
]


def _value(rng: random.Random) -> Any:
    return rng.choice(NUMBERS if rng.random() < 0.5 else OTHERS)


def _read(folder: Path, name: str) -> Any:
    if (folder / name).exists() and not (folder / name).is_file():  # an earlier mutation's pipe or device
        return {}
    return json.loads((folder / name).read_text("utf-8"))


def _write(folder: Path, name: str, value: Any) -> None:
    text = json.dumps(value, indent=2)
    while (at := text.find('"\\u0000raw:')) >= 0:
        end = text.index('"', at + 1)
        text = text[:at] + text[at + len('"\\u0000raw:') : end] + text[end + 1 :]
    if (folder / name).exists() and not (folder / name).is_file():  # an earlier mutation's, to which nobody listens
        (folder / name).unlink()
    (folder / name).write_text(text)


def _flip(data: bytes, rng: random.Random, times: int) -> bytes:
    changed = bytearray(data)
    for _ in range(times):
        if changed:
            changed[rng.randrange(len(changed))] = rng.randrange(256)
    return bytes(changed)


def _damage(file: Path, rng: random.Random) -> str:
    """Change a file's bytes without knowing what they mean."""
    data = file.read_bytes()
    at = rng.randrange(len(data) + 1)
    kind = rng.choice(("flip", "flips", "truncate", "cut", "insert", "double", "empty", "zeros", "extend", "line ends"))
    changes: dict[str, Callable[[], bytes]] = {
        "flip": lambda: _flip(data, rng, 1),
        "flips": lambda: _flip(data, rng, rng.randrange(2, 40)),
        "truncate": lambda: data[:at],
        "cut": lambda: data[:at] + data[at + rng.randrange(1, 64) :],
        "insert": lambda: (
            data[:at] + rng.choice((b"\xff", b"\x00", b"{", b'"', b"[" * 3000, b"\xef\xbb\xbf")) + data[at:]
        ),
        "double": lambda: data + data,
        "empty": lambda: b"",
        "zeros": lambda: bytes(len(data)),
        "extend": lambda: data + rng.randbytes(rng.randrange(1, 100)),
        "line ends": lambda: data.replace(b"\n", b"\r\n"),
    }
    file.write_bytes(changes[kind]())
    return f"{file.name} {kind}"


def _places(value: Any) -> list[tuple[Any, Any]]:
    """Every (container, key) below a JSON value."""
    places = []
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        places.append((value, key))
        places += _places(inner)
    return places


def config_value(folder: Path, rng: random.Random) -> str:
    """Set one value that is there to something else."""
    config = _read(folder, "config.json")
    owner, key = rng.choice(_places(config))
    owner[key] = _value(rng)
    _write(folder, "config.json", config)
    return f"config {key}"


def config_field(folder: Path, rng: random.Random) -> str:
    """Set a field that readers look at, whether it was there or not."""
    config = _read(folder, "config.json")
    owner = config.get("text_config") if rng.random() < 0.3 and isinstance(config.get("text_config"), dict) else config
    key = rng.choice(FIELDS)
    owner[key] = _value(rng)
    _write(folder, "config.json", config)
    return f"config {key}"


def config_near(folder: Path, rng: random.Random) -> str:
    """Numbers that are nearly right: other head counts, sizes, layers, vocabulary."""
    config = _read(folder, "config.json")
    places = [(owner, key) for owner, key in _places(config) if type(owner[key]) is int]
    owner, key = rng.choice(places)
    owner[key] = rng.choice((owner[key] * 2, owner[key] // 2, owner[key] + 1, max(0, owner[key] - 1)))
    _write(folder, "config.json", config)
    return f"config {key}"


def config_drop(folder: Path, rng: random.Random) -> str:
    """Leave some keys out."""
    config = _read(folder, "config.json")
    for _ in range(rng.randrange(1, 4)):
        places = [(owner, key) for owner, key in _places(config) if isinstance(owner, dict)]
        if places:
            owner, key = rng.choice(places)
            del owner[key]
    _write(folder, "config.json", config)
    return "config dropped"


def config_identity(folder: Path, rng: random.Random) -> str:
    """Another model type or class."""
    config = _read(folder, "config.json")
    if rng.random() < 0.5:
        config["model_type"] = rng.choice(TYPES)
    else:
        config["architectures"] = [rng.choice(CLASSES)]
    if rng.random() < 0.2:
        config["auto_map"] = {"AutoConfig": "own.Own", "AutoModelForCausalLM": "own.OwnModel"}
    _write(folder, "config.json", config)
    return f"config is {config.get('model_type')} {config.get('architectures')}"


def config_bytes(folder: Path, rng: random.Random) -> str:
    """Damage config.json blindly."""
    return _damage(folder / "config.json", rng)


def _weight_files(folder: Path) -> list[Path]:
    return sorted(file for kind in ("*.safetensors", "*.bin") for file in folder.glob(kind) if file.is_file())


def weight_bytes(folder: Path, rng: random.Random) -> str:
    """Damage a weight file blindly; half of the time near its beginning or end, where its structure is."""
    file = rng.choice(_weight_files(folder))
    data = file.read_bytes()
    if rng.random() < 0.5 or len(data) < 2000:
        return _damage(file, rng)
    part = rng.choice((slice(0, 1000), slice(len(data) - 1000, len(data))))
    file.write_bytes(data[: part.start] + _flip(data[part], rng, rng.randrange(1, 6)) + data[part.stop :])
    return f"{file.name} structure"


def header(folder: Path, rng: random.Random) -> str:
    """Lie in a safetensors header; elsewhere, change the tensors."""
    files = [file for file in _weight_files(folder) if file.suffix == ".safetensors"]
    if not files:
        return tensors(folder, rng)
    file = rng.choice(files)
    data = file.read_bytes()
    length = int.from_bytes(data[:8], "little")
    table, body = json.loads(data[8 : 8 + length]), data[8 + length :]
    keys = [key for key in table if key != "__metadata__"]
    key = rng.choice(keys)
    kind = rng.choice(("shape", "dtype", "offsets", "drop", "rename", "doubled", "metadata", "entry", "length", "many"))
    text = None
    if kind == "shape":
        shape = table[key]["shape"]
        choices = (
            shape[::-1],
            [*shape, 1],
            shape[1:],
            [2**62] * 70,
            [_value(rng)],
            [0, *shape],
            [-1, *shape],
            [1] * 99,
        )
        table[key]["shape"] = rng.choice(choices)
    elif kind == "dtype":
        table[key]["dtype"] = rng.choice(("F16", "BF16", "I32", "F8_E4M3", "F4", "X9", "", None, 3, "\ud800"))
    elif kind == "offsets":
        begin, end = table[key]["data_offsets"]
        spans = ([end, begin], [begin + 4, end], [begin, end - 4], [0, 2**63], [_value(rng), end], [begin], [-4, end])
        table[key]["data_offsets"] = rng.choice(spans)
    elif kind == "drop":
        del table[key]
    elif kind == "rename":
        table[rng.choice(("x", key.upper(), "module." + key, "\ud800", "a\nb", key + "." * 400, ""))] = table.pop(key)
    elif kind == "doubled":
        text = json.dumps(table)[:-1] + f', "{key}": {json.dumps(table[key])}}}'
    elif kind == "metadata":
        table["__metadata__"] = _value(rng) if rng.random() < 0.5 else {"format": _value(rng)}
    elif kind == "entry":
        table[key] = _value(rng)
    elif kind == "many":
        for number in range(rng.choice((10, 3000))):
            table[f"extra.{number}"] = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
    raw = (text or json.dumps(table)).replace('"\\u0000raw:', "").encode()
    size = rng.choice((0, 1, length - 1, len(raw) + 8, 2**40, 2**63)) if kind == "length" else len(raw)
    file.write_bytes(size.to_bytes(8, "little") + raw + body)
    return f"{file.name} header {kind}"


def _load(file: Path) -> dict[str, torch.Tensor]:
    if file.suffix == ".bin":
        return dict(torch.load(file, weights_only=True))
    from safetensors.torch import load_file

    return load_file(file)


def _save(file: Path, table: dict[str, Any]) -> None:
    if file.suffix == ".bin":
        torch.save(table, file)
        return
    from safetensors.torch import save_file

    plain = {key: x.contiguous().clone() for key, x in table.items() if isinstance(x, torch.Tensor)}
    save_file(plain, file, {"format": "pt"})


def tensors(folder: Path, rng: random.Random) -> str:
    """Change the tensors themselves: shapes, dtypes, values, names; what a trainer or a script might have written."""
    file = rng.choice(_weight_files(folder))
    table: dict[str, Any] = _load(file)
    keys = list(table)
    near = [
        key
        for key in keys
        if any(part in key for part in ("k_proj", "v_proj", "query_key_value", "c_attn", ".k.", ".v."))
    ]
    key = rng.choice(near if near and rng.random() < 0.6 else keys)
    x = table[key]
    kind = rng.choice(
        [
            "drop",
            "drop",
            "shape",
            "transpose",
            "nan",
            "dtype",
            "rename",
            "prefix",
            "lora",
            "empty",
            "half",
            "double",
            "extra bias",
            "strided",
            "expanded",
            "not a tensor",
            "nested",
            "layer",
            "scalar",
        ]
    )
    if kind == "drop":
        del table[key]
    elif kind == "shape":
        table[key] = torch.zeros([size + rng.choice((0, 1, -1, 8)) for size in x.shape])
    elif kind == "transpose":
        table[key] = x.t() if x.dim() == 2 else x[None]
    elif kind == "nan":
        table[key] = torch.full_like(x, rng.choice((float("nan"), float("inf"), -float("inf"))))
    elif kind == "dtype":
        kinds = (torch.float16, torch.bfloat16, torch.float64, torch.int8, torch.int64, torch.bool, torch.uint8,
                 torch.float8_e4m3fn, torch.complex64)  # fmt: skip
        table[key] = x.to(rng.choice(kinds))
    elif kind == "rename":
        table[rng.choice((key + "_2", key.replace("model", "modle"), "x", key.replace("layers", "h")))] = table.pop(key)
    elif kind == "prefix":
        prefix = rng.choice(("_orig_mod.", "module.", "base_model.model.", "net.", "model."))
        table = {prefix + name: value for name, value in table.items()}
    elif kind == "lora":
        table[key.replace("weight", "lora_A.default.weight")] = torch.zeros(2, 2)
    elif kind == "empty":
        table = {name: torch.empty(0) if value.dim() > 1 or name == key else value for name, value in table.items()}
    elif kind == "half":
        table[key] = x[: max(1, len(x) // 2)] if x.dim() else x
    elif kind == "double":
        table[key] = torch.cat([x, x]) if x.dim() else x
    elif kind == "extra bias":
        table[key.replace("weight", "bias")] = torch.zeros(x.shape[:1])
    elif kind == "strided":
        table[key] = torch.cat([x, x], dim=-1)[..., ::2] if x.dim() else x
    elif kind == "expanded":
        table["extra.weight"] = torch.zeros(1).expand(rng.choice((8, 1 << 20, 1 << 33)))
        if file.suffix != ".bin":
            table["extra.weight"] = torch.zeros(8)
    elif kind == "not a tensor":
        table[key] = rng.choice((None, 3, "x", [1], {"a": 1}, (x, x)))
        if file.suffix != ".bin":
            del table[key]
    elif kind == "nested":
        table = {rng.choice(("state_dict", "model", "module")): table} if file.suffix == ".bin" else {"only": x}
    elif kind == "layer":
        table = {name: value for name, value in table.items() if ".1." not in name}
    elif kind == "scalar":
        table[key] = torch.tensor(1.0)
    _save(file, table)
    return f"tensors {kind}"


class _Bomb:
    def __init__(self, target: str) -> None:
        self.target = target

    def __reduce__(self) -> Any:
        return os.mkdir, (self.target,)


def pickle_bomb(folder: Path, rng: random.Random) -> str:
    """A pickle that makes a folder outside when it is run."""
    for file in _weight_files(folder):
        file.unlink()
    table = {"a": torch.ones(2), "b": _Bomb(str(folder.parent / "outside" / "exploded"))}
    torch.save(table, folder / "pytorch_model.bin", _use_new_zipfile_serialization=rng.random() < 0.5)
    return "pickle bomb"


def index(folder: Path, rng: random.Random) -> str:
    """Change an index, or make one, so that names lead elsewhere or to nothing."""
    names = [name for name in os.listdir(folder) if name.endswith(".index.json")]
    if not names:
        file = rng.choice(_weight_files(folder))
        keys = list(_load(file))
        name = f"{'model.safetensors' if file.suffix == '.safetensors' else 'pytorch_model.bin'}.index.json"
        shard = f"model-00001-of-00001{file.suffix}"
        file.rename(folder / shard)
        _write(folder, name, {"metadata": {}, "weight_map": dict.fromkeys(keys, shard)})
        names = [name]
    name = rng.choice(names)
    if rng.random() < 0.2:
        return _damage(folder / name, rng)
    table = _read(folder, name)
    weight_map = table["weight_map"]
    key = rng.choice(list(weight_map))
    kind = rng.choice(("outside", "missing", "key", "drop", "value", "other", "whole", "link", "stale"))
    suffix = ".safetensors" if "safetensors" in name else ".bin"
    if kind == "outside":
        weight_map[key] = rng.choice(
            (f"../outside/secret{suffix}", f"/etc/x{suffix}", f"a/../../outside/secret{suffix}", "..")
        )
    elif kind == "missing":
        weight_map[key] = "gone" + suffix
    elif kind == "key":
        weight_map["no.such.key"] = weight_map[key]
    elif kind == "drop":
        del weight_map[key]
    elif kind == "value":
        weight_map[key] = _value(rng)
    elif kind == "other":
        weight_map[key] = rng.choice(list(weight_map.values()))
    elif kind == "whole":
        table = _value(rng) if rng.random() < 0.5 else {"weight_map": _value(rng)}
    elif kind == "link":
        (folder / f"linked{suffix}").symlink_to(f"../outside/secret{suffix}")
        weight_map[key] = f"linked{suffix}"
    else:
        overlay = (folder / rng.choice(("zz-overlay", "aa-overlay"))).with_suffix(suffix)
        _save(overlay, {key: torch.zeros(2, 2)})
        weight_map[key] = overlay.name
    _write(folder, name, table)
    return f"index {kind}"


def stray(folder: Path, rng: random.Random) -> str:
    """Put something into the folder, or in the place of something, that is no ordinary file or no business of ours."""
    fixed = rng.choice(
        [
            "config.json",
            "gqa_convert.json",
            "model.safetensors",
            "tokenizer.json",
            "generation_config.json",
            "model.safetensors.index.json",
            "pytorch_model.bin",
            "adapter_config.json",
        ]
    )
    path = folder / fixed
    kind = rng.choice(
        [
            "pipe",
            "folder",
            "device",
            "dangling",
            "loop",
            "record",
            "adapter",
            "name",
            "secret",
            "deep",
            "huge",
            "tokenizer",
            "generation",
            "shadow",
            "code",
            "dcp",
        ]
    )
    if kind in ("pipe", "folder", "device", "dangling", "loop"):
        if path.is_dir():
            return "stray nothing"
        path.unlink(missing_ok=True)
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "device":
        path.symlink_to(rng.choice(("/dev/zero", "/dev/null", "/dev/full")))
    elif kind == "dangling":
        path.symlink_to("nothing-there")
    elif kind == "loop":
        path.symlink_to(path.name)
    elif kind == "record":
        conversion = {name: _value(rng) for name in ("method", "seed", "route", "recipe")}
        records = (_value(rng), {"tool": _value(rng), "conversion": _value(rng)}, {"conversion": conversion})
        _write(folder, "gqa_convert.json", rng.choice(records))
    elif kind == "adapter":
        (folder / "adapter_config.json").write_text("{}")
    elif kind == "name":
        odd = os.fsencode(folder) + b"/" + rng.choice((b"caf\xe9.txt", b"a\nb.txt", b"\xff\xfe", b"[red]", b"x" * 255))
        with open(odd, "w") as stream:
            stream.write("x")
    elif kind == "secret":
        name = rng.choice(("gqa_convert.json", "tokenizer.model", "notes.txt", "modeling_x.py", "docs"))
        (folder / name).unlink(missing_ok=True)
        (folder / name).symlink_to(rng.choice(("../outside/secret.json", "../outside", "../../../../etc/hostname")))
    elif kind == "deep":
        (folder / "/".join(["d"] * rng.choice((3, 60)))).mkdir(parents=True, exist_ok=True)
    elif kind == "huge":
        if fixed.startswith(("token", "generation")) or (path.exists() and not path.is_file()):
            return "stray nothing"  # a copy of it would fill the disk, as it must
        with open(path, "ab") as grown:
            grown.truncate(rng.choice((1 << 28, 1 << 36)))
    elif kind == "tokenizer":
        _write(folder, "tokenizer_config.json", rng.choice((_value(rng), {"tokenizer_class": _value(rng)})))
    elif kind == "generation":
        _write(folder, "generation_config.json", rng.choice((_value(rng), {"bos_token_id": _value(rng)})))
    elif kind == "shadow":
        (folder / rng.choice(("model.safetensors", "pytorch_model.bin"))).write_bytes(rng.randbytes(100))
    elif kind == "code":
        (folder / "own.py").write_text(f"import os; os.mkdir({str(folder.parent / 'outside' / 'exploded')!r})\n")
        config = _read(folder, "config.json")
        config["auto_map"] = {"AutoConfig": "own.Own", "AutoModelForCausalLM": "own.OwnModel"}
        _write(folder, "config.json", config)
    elif kind == "dcp":
        for weights in _weight_files(folder):
            weights.unlink()
        (folder / rng.choice(("pytorch_model_fsdp_0", "global_step5"))).mkdir()
    return f"stray {kind} {fixed if kind in ('pipe', 'folder', 'device', 'dangling', 'loop', 'huge') else ''}".strip()


MUTATIONS: tuple[tuple[Mutation, float], ...] = (
    (config_value, 3),
    (config_field, 4),
    (config_near, 3),
    (config_drop, 1),
    (config_identity, 1.5),
    (config_bytes, 1),
    (weight_bytes, 2),
    (header, 2.5),
    (tensors, 4),
    (pickle_bomb, 0.3),
    (index, 2),
    (stray, 3),
)


def mutate(folder: Path, rng: random.Random) -> list[str]:
    """Damage a folder in one to three ways; returns what was done. 2 % are left as they are."""
    if rng.random() < 0.02:
        return []
    done = []
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        mutation = rng.choices([m for m, _ in MUTATIONS], [w for _, w in MUTATIONS])[0]
        try:
            done.append(mutation(folder, rng))
        except Exception as error:  # an earlier one has left nothing that this one could change
            done.append(f"{mutation.__name__} not possible ({type(error).__name__})")
    return done
