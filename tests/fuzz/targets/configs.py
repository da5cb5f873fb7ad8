"""Files that the operator writes or points to: the configuration, keys, and headers of models and profiles."""

from __future__ import annotations

import json
import struct
from random import Random
from typing import Any

import yaml

from server.config import ConfigError, ModelSettings, load_settings
from server.scheduler.facts import predict, rungs_for
from spectral.keyfile import KeyFileError, load_keys
from tests.fuzz.mutate import json_bytes, mutate_bytes, mutate_document
from tests.fuzz.targets.base import Base

SECRET = "s3cret-of-the-administrator"
CONFIG = {
    "server": {"host": "127.0.0.1", "port": 8000, "max_body_bytes": "10MiB", "admin_key": SECRET},
    "auth": {"keys": [{"name": "k", "hash": "sha256:" + "0" * 64, "role": "user", "models": ["a*"]}]},
    "logging": {"format": "json", "level": "info"},
    "memory": {},
    "defaults": {"device": "cpu", "limits": {"max_concurrency": 4}},
    "models": [{"name": "demo", "path": "demo-7m", "aliases": ["d"], "limits": {"max_kv_bytes": "1MiB"}}],
}
TRICKS = (
    "a: &a [x, x, x]\nb: &b [*a, *a, *a, *a, *a, *a]\nc: &c [*b, *b, *b, *b, *b, *b]\nmodels: [*c, *c, *c]\n",
    "? [a, b]\n: c\nmodels: []\n",
    "? {a: b}\n: c\n",
    "&a {<<: *a}\n",
    "models: &a [*a]\n",
    "models: !!python/object/apply:os.system [id]\n",
    "models: !!binary x\n",
    "models: 2001-99-99\n",
    "a: 1e400\nmodels: [.inf, .nan, 0x_, 1:99:99]\n",
    "server: {port: 0b}\n",
    "server: {port: 190:20:30}\n",
    "models: [{name: a, path: !!set {a, b}}]\n",
    "models: [{name: !!timestamp 2001-13-01}]\n",
    "{" * 300,
    "[" * 3000,
    "a: &x {k: 1}\nb: &y {<<: [*x, *x, *x, *x]}\nc: &z {<<: [*y, *y, *y, *y]}\nd: {<<: [*z, *z, *z, *z]}\n",
    "--- a\n--- b\n",
    "%YAML 9.9\n---\nmodels: []\n",
    "\ufeffmodels: []\n",
)
KEYS = {"format": 1, "keys": [{"name": "a", "hash": "sha256:" + "1" * 64, "role": "admin", "models": ["x"]}]}
MODEL = {"model_type": "qwen3", "num_hidden_layers": 2, "num_attention_heads": 4, "hidden_size": 32, "head_dim": 8}
MODEL |= {"num_key_value_heads": 2, "max_position_embeddings": 512, "layer_types": ["full_attention", "sliding"]}
WEIGHTS = {"__metadata__": {}, "w": {"dtype": "F32", "shape": [4, 4], "data_offsets": [0, 64]}}
ROW = {"name": "8x", "kl_mean": 0.1, "page_nbytes": 100, "page_tokens": 16, "window_nbytes": 10}


class _Files(Base):
    seconds = 2.0


class Config(_Files):
    """config.yaml: settings, or ConfigError. PyYAML takes a second for a thousand brackets."""

    name = "config"
    seconds = 5.0

    def make(self, random: Random) -> bytes:
        """A file."""
        if random.random() < 0.3:
            text = random.choice(TRICKS)
            return text.encode() if random.random() < 0.3 else mutate_bytes(text.encode(), random)
        document = mutate_document(CONFIG, random, ("trust_remote_code", "keys_file", "setting", "profile", "<<"))
        try:
            text = yaml.safe_dump(document, allow_unicode=random.random() < 0.5)
        except (yaml.YAMLError, RecursionError):
            text = json.dumps(document)
        data = text.encode("utf-8", "surrogatepass")
        return mutate_bytes(data, random) if random.random() < 0.4 else data

    def check(self, item: bytes) -> str:
        """Load it."""
        path = self.folder / "config.yaml"
        path.write_bytes(item)
        alone = item.count(SECRET.encode()) == item.count(b"admin_key: " + SECRET.encode())
        try:
            settings = load_settings(path)
        except ConfigError as error:
            assert not alone or SECRET not in str(error), "the administrator's key is in the message"
            return "refused"
        assert not alone or SECRET not in repr(settings)
        return "accepted"


class Keys(_Files):
    """A file of keys: records, or KeyFileError."""

    name = "keys"

    def make(self, random: Random) -> bytes:
        """A file."""
        data = json_bytes(mutate_document(KEYS, random, ("models", "expires", "requests_per_minute", "revoked")))
        return mutate_bytes(data, random) if random.random() < 0.4 else data

    def check(self, item: bytes) -> str:
        """Load it, and use every record."""
        path = self.folder / "keys.json"
        path.write_bytes(item)
        try:
            records = load_keys(path)
        except KeyFileError:
            return "refused"
        from datetime import datetime, timezone

        from server.auth import Caller
        from server.limits import Limiter

        for record in records:
            record.valid_at(datetime.now(timezone.utc))
            Caller(record).may_use("demo", "d")
            assert Limiter().admit(Caller(record)) is not None
        return "accepted"


class Headers(_Files):
    """What the planner reads of a model's folder and a profile's header: a prediction, whatever is in them."""

    name = "headers"

    def make(self, random: Random) -> tuple[bytes, bytes, bytes]:
        """config.json, a safetensors header, a profile's header."""
        sealed: Any = {"document": json.dumps({"ladder": [ROW, {**ROW, "name": "16x"}], "default": "8x"})}
        which = random.randrange(3)
        if which == 0:
            document = mutate_document(json.loads(sealed["document"]), random, ("ladder",))
            sealed = {"document": json.dumps(document)}
        elif which == 1:
            sealed = mutate_document(sealed, random)
        config = mutate_document(MODEL, random, ("text_config",)) if random.random() < 0.5 else MODEL
        weights = mutate_document(WEIGHTS, random) if random.random() < 0.5 else WEIGHTS
        files = [json_bytes(config), _framed(weights), _framed({"__metadata__": {"spectral": json.dumps(sealed)}})]
        if random.random() < 0.2:
            which = random.randrange(3)
            files[which] = mutate_bytes(files[which], random)
        return files[0], files[1], files[2]

    def check(self, item: tuple[bytes, bytes, bytes]) -> str:
        """Predict."""
        config, weights, profile = item
        (self.folder / "config.json").write_bytes(config)
        (self.folder / "model.safetensors").write_bytes(weights)
        path = self.folder / "profile" / "p.safetensors"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(profile)
        model = ModelSettings(name="m", path=str(self.folder))
        found = predict(model, "cpu", str(path))
        for setting in ("auto", "exact", "8x"):
            assert rungs_for(setting, found)
        assert found.weights >= 0 and found.context >= 0 and found.token_nbytes >= 0
        for rung in found.rungs:
            assert isinstance(rung.name, str) and rung.token_bytes >= 0 and rung.kl >= 0
        return "known" if found.known else "unknown"


def _framed(document: Any) -> bytes:
    data = json_bytes(document)
    return struct.pack("<Q", len(data)) + data


TARGETS = {"config": Config, "keys": Keys, "headers": Headers}
