# Made by tests/interface/make_stub.py; do not edit.

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path as Path
from typing import Any, Literal, overload

import numpy as np

from loratools import training as training
from loratools.algebra.ranks import Budget as Budget
from loratools.face.check import CheckResult as CheckResult
from loratools.face.check import RuleResult as RuleResult
from loratools.face.compare import BasesResult as BasesResult
from loratools.face.compare import CompareResult as CompareResult
from loratools.face.convert import ConvertResult as ConvertResult
from loratools.face.convert import WriteResult as WriteResult
from loratools.face.dequantize import DequantizeResult as DequantizeResult
from loratools.face.extract import ExtractChoices as ExtractChoices
from loratools.face.extract import ExtractResult as ExtractResult
from loratools.face.fleet_index import FleetDedupResult as FleetDedupResult
from loratools.face.fleet_index import FleetIndexResult as FleetIndexResult
from loratools.face.fleet_index import FleetSimilarResult as FleetSimilarResult
from loratools.face.fleet_share import FleetAddResult as FleetAddResult
from loratools.face.fleet_share import FleetShareResult as FleetShareResult
from loratools.face.fleet_share import FleetUnshareResult as FleetUnshareResult
from loratools.face.fuse import FusePlan as FusePlan
from loratools.face.fuse import FuseResult as FuseResult
from loratools.face.fuse_parts import FusePart as FusePart
from loratools.face.info import InfoResult as InfoResult
from loratools.face.info_base import BaseInfoResult as BaseInfoResult
from loratools.face.lists import FormatsResult as FormatsResult
from loratools.face.lists import MethodsResult as MethodsResult
from loratools.face.merge import MergeResult as MergeResult
from loratools.face.plan_squeeze import PlanSqueezeResult as PlanSqueezeResult
from loratools.face.provenance import ProvenanceResult as ProvenanceResult
from loratools.face.push import PushResult as PushResult
from loratools.face.quantize import QuantizeResult as QuantizeResult
from loratools.face.repair import RepairResult as RepairResult
from loratools.face.spectrum import SpectrumResult as SpectrumResult
from loratools.face.squeeze import SqueezeChoices as SqueezeChoices
from loratools.face.squeeze import SqueezeResult as SqueezeResult
from loratools.face.to_dora import ToDoraResult as ToDoraResult
from loratools.face.to_lora import ToLoraChoices as ToLoraChoices
from loratools.face.to_lora import ToLoraResult as ToLoraResult
from loratools.face.verify import VerifyResult as VerifyResult
from loratools.operations.merge.options import Override as Override
from loratools.pipeline.fleet.run import FleetResult as FleetResult
from loratools.pipeline.replay import ReplayResult as ReplayResult
from loratools.pipeline.run import RunResult as RunResult
from loratools.work.shard import Shard as Shard
from loratools_formats.checkpoints.checkpoint import Checkpoint as Checkpoint
from loratools_formats.core.adapter import Adapter as Adapter
from loratools_formats.disk.errors import LoratoolsError as LoratoolsError

__version__: str

def check(
    sources: str | os.PathLike[str] | Adapter | Sequence[str | os.PathLike[str] | Adapter],
    *,
    select: Sequence[str] = (),
    ignore: Sequence[str] = (),
    target: Sequence[str] = (),
    headers_only: bool = False,
    baseline: str | os.PathLike[str] | None = None,
    fail_on: Literal["error", "warning", "note", "never"] | None = None,
    base: str | os.PathLike[str] | Checkpoint | None = None,
    fix: bool = False,
    allow_lossy: bool = False,
    format: str | None = None,
    carry_unknown: bool = False,
    output: str | os.PathLike[str] | None = None,
    overwrite: bool = False,
    workers: int | None = None,
    revision: str | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> CheckResult: ...
def rule(name: str) -> RuleResult: ...
def compare(
    adapters: Mapping[str, str | os.PathLike[str] | Adapter]
    | Sequence[str | os.PathLike[str] | Adapter],
    *,
    base: str | os.PathLike[str] | Checkpoint | None = None,
    exact: bool = False,
    sample: int = 65536,
    seed: int = 0,
    include: str | None = None,
    exclude: str | None = None,
    workers: int | None = None,
    format: str | None = None,
    carry_unknown: bool = False,
    ignore_key: Sequence[str] = (),
    revision: str | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> CompareResult: ...
def compare_bases(
    source: str | os.PathLike[str] | Adapter,
    base: str | os.PathLike[str] | Checkpoint,
    other: str | os.PathLike[str] | Checkpoint,
    *,
    include: str | None = None,
    exclude: str | None = None,
    workers: int | None = None,
    format: str | None = None,
    carry_unknown: bool = False,
    ignore_key: Sequence[str] = (),
    revision: str | None = None,
) -> BasesResult: ...
def convert(
    source: str | os.PathLike[str] | Adapter,
    *,
    base: str | os.PathLike[str] | None = None,
    to: str | None = None,
    dtype: str | None = None,
    set: Sequence[tuple[str, str] | str] | Mapping[str, str] = (),
    keep_alpha: bool = False,
    fold_alpha: bool = False,
    allow_lossy: bool = False,
    names_of: Literal["4", "5"] | None = None,
    experts: Literal["stacked", "each", "3d", "shared-outer"] | None = None,
    peft_layout: Literal["0.18", "0.19.1"] | None = None,
    for_: str | None = None,
    names: str | None = None,
    names_from: str | os.PathLike[str] | None = None,
    component: str | None = None,
    strip_training_metadata: bool = False,
    drop: str | None = None,
    keep: str | None = None,
    format: str | None = None,
    carry_unknown: bool = False,
    ignore_key: Sequence[str] = (),
    output: str | os.PathLike[str] | None = None,
    overwrite: bool = False,
    in_place: bool = False,
    max_error: float | str | None = None,
    revision: str | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> ConvertResult: ...
def write(
    adapter: Adapter,
    path: str | os.PathLike[str],
    *,
    format: str | None = None,
    base: str | os.PathLike[str] | None = None,
    allow_lossy: bool = False,
    overwrite: bool = False,
    revision: str | None = None,
) -> WriteResult: ...
def dequantize(
    base: str | os.PathLike[str] | Checkpoint,
    *,
    workers: int | None = None,
    max_shard_size: int | str | None = None,
    dtype: Literal["f32", "f16", "bf16"] = "bf16",
    output: str | os.PathLike[str] | None = None,
    overwrite: bool = False,
    revision: str | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> DequantizeResult: ...
def extract(
    base: str | os.PathLike[str] | Checkpoint,
    tuned: str | os.PathLike[str] | Checkpoint,
    *,
    base_name: str | None = None,
    to: Literal["peft", "kohya", "comfyui", "diffusers"] | None = None,
    component: str | None = None,
    rank: int | None = None,
    energy: float | str | None = None,
    sv_ratio: float | None = None,
    sv_fro: float | str | None = None,
    sv_cumulative: float | str | None = None,
    threshold: bool = False,
    budget: Budget | str | float | None = None,
    max_rank: int | None = None,
    min_rank: int | None = None,
    rank_pattern: Sequence[tuple[str, int] | str] | Mapping[str, int] = (),
    uniform: bool = False,
    serve_ranks: bool = False,
    workers: int | None = None,
    device: Literal["cpu", "cuda", "mps"] = "cpu",
    dtype: Literal["f32", "f16", "bf16"] | None = None,
    svd: Literal["exact", "rsvd"] = "exact",
    oversample: int = 10,
    power_iterations: int = 2,
    seed: int = 0,
    keep_alpha: bool = False,
    include: str | None = None,
    exclude: str | None = None,
    output: str | os.PathLike[str] | None = None,
    overwrite: bool = False,
    max_error: float | str | None = None,
    revision: str | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> ExtractResult: ...
def extract_choices(
    base: str | os.PathLike[str] | Checkpoint,
    tuned: str | os.PathLike[str] | Checkpoint,
    *,
    to: Literal["peft", "kohya", "comfyui", "diffusers"] | None = None,
    workers: int | None = None,
    device: Literal["cpu", "cuda", "mps"] = "cpu",
    dtype: Literal["f32", "f16", "bf16"] | None = None,
    svd: Literal["exact", "rsvd"] = "exact",
    oversample: int = 10,
    power_iterations: int = 2,
    seed: int = 0,
    keep_alpha: bool = False,
    include: str | None = None,
    exclude: str | None = None,
    revision: str | None = None,
) -> ExtractChoices: ...
def fleet_dedup(
    index: str | os.PathLike[str],
    *,
    threshold: float = 0.99,
    same_start: float = 0.5,
    exact: bool = True,
) -> FleetDedupResult: ...
def fleet_index(
    adapters: Sequence[str | os.PathLike[str]],
    *,
    update: bool = False,
    workers: int | None = None,
    format: str | None = None,
    ignore_key: Sequence[str] = (),
    output: str | os.PathLike[str] | None = None,
    overwrite: bool = False,
    revision: str | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> FleetIndexResult: ...
def fleet_similar(
    source: str | os.PathLike[str] | Adapter,
    index: str | os.PathLike[str],
    *,
    top: int = 10,
    exact: bool = True,
    workers: int | None = None,
    format: str | None = None,
    ignore_key: Sequence[str] = (),
    revision: str | None = None,
) -> FleetSimilarResult: ...
def fleet_add(
    shared: str | os.PathLike[str] | Adapter,
    source: str | os.PathLike[str] | Adapter,
    *,
    name: str | None = None,
    group: int | None = None,
    force_base: bool = False,
    drop: str | None = None,
    keep: str | None = None,
    workers: int | None = None,
    format: str | None = None,
    carry_unknown: bool = False,
    ignore_key: Sequence[str] = (),
    output: str | os.PathLike[str] | None = None,
    overwrite: bool = False,
    max_error: float | str | None = None,
    revision: str | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> FleetAddResult: ...
def fleet_share(
    adapters: Mapping[str, str | os.PathLike[str] | Adapter]
    | Sequence[str | os.PathLike[str] | Adapter],
    *,
    cores: Literal["full", "diagonal", "principal"] = "full",
    clusters: int | str | None = None,
    weigh: Literal["adapter", "module", "norm"] = "adapter",
    force_base: bool = False,
    allow_missing: bool = False,
    rank: int | None = None,
    energy: float | str | None = None,
    sv_fro: float | str | None = None,
    budget: Budget | str | float | None = None,
    max_rank: int | None = None,
    min_rank: int | None = None,
    rank_pattern: Sequence[tuple[str, int] | str] | Mapping[str, int] = (),
    uniform: bool = False,
    serve_ranks: bool = False,
    dtype: Literal["f32", "f16", "bf16"] | None = None,
    workers: int | None = None,
    drop: str | None = None,
    keep: str | None = None,
    format: str | None = None,
    carry_unknown: bool = False,
    ignore_key: Sequence[str] = (),
    output: str | os.PathLike[str] | None = None,
    overwrite: bool = False,
    max_error: float | str | None = None,
    revision: str | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> FleetShareResult: ...
def fleet_unshare(
    shared: str | os.PathLike[str] | Adapter,
    *,
    name: Sequence[str] = (),
    all: bool = False,
    dtype: Literal["f32", "f16", "bf16"] | None = None,
    workers: int | None = None,
    output: str | os.PathLike[str] | None = None,
    overwrite: bool = False,
    revision: str | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> FleetUnshareResult: ...
@overload
def fuse(
    base: str | os.PathLike[str] | Checkpoint,
    adapters: str
    | os.PathLike[str]
    | Adapter
    | Mapping[str, float]
    | Mapping[Path, float]
    | Sequence[str | os.PathLike[str] | Adapter | tuple[str | os.PathLike[str] | Adapter, float]],
    *,
    workers: int | None = None,
    device: Literal["cpu", "cuda", "mps"] = "cpu",
    max_shard_size: int | str | None = None,
    dtype: str | None = None,
    base_mode: Literal["dequant", "original"] | None = None,
    requantize: bool = False,
    changed_bits: int | None = None,
    trained_on: str | None = None,
    allow_lossy: bool = False,
    fallback: Literal["f16", "q8_0"] | None = None,
    drop: str | None = None,
    keep: str | None = None,
    format: str | None = None,
    ignore_key: Sequence[str] = (),
    shard: None = None,
    scheduler: str | None = None,
    output: str | os.PathLike[str],
    overwrite: bool = False,
    revision: str | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> FuseResult: ...
@overload
def fuse(
    base: str | os.PathLike[str] | Checkpoint,
    adapters: str
    | os.PathLike[str]
    | Adapter
    | Mapping[str, float]
    | Mapping[Path, float]
    | Sequence[str | os.PathLike[str] | Adapter | tuple[str | os.PathLike[str] | Adapter, float]],
    *,
    workers: int | None = None,
    device: Literal["cpu", "cuda", "mps"] = "cpu",
    max_shard_size: int | str | None = None,
    dtype: str | None = None,
    base_mode: Literal["dequant", "original"] | None = None,
    requantize: bool = False,
    changed_bits: int | None = None,
    trained_on: str | None = None,
    allow_lossy: bool = False,
    fallback: Literal["f16", "q8_0"] | None = None,
    drop: str | None = None,
    keep: str | None = None,
    format: str | None = None,
    ignore_key: Sequence[str] = (),
    shard: Shard | str,
    scheduler: str | None = None,
    output: str | os.PathLike[str],
    overwrite: bool = False,
    revision: str | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> FuseResult | FusePart: ...
@overload
def fuse(
    base: str | os.PathLike[str] | Checkpoint,
    adapters: str
    | os.PathLike[str]
    | Adapter
    | Mapping[str, float]
    | Mapping[Path, float]
    | Sequence[str | os.PathLike[str] | Adapter | tuple[str | os.PathLike[str] | Adapter, float]],
    *,
    workers: int | None = None,
    device: Literal["cpu", "cuda", "mps"] = "cpu",
    max_shard_size: int | str | None = None,
    dtype: str | None = None,
    base_mode: Literal["dequant", "original"] | None = None,
    requantize: bool = False,
    changed_bits: int | None = None,
    trained_on: str | None = None,
    allow_lossy: bool = False,
    fallback: Literal["f16", "q8_0"] | None = None,
    drop: str | None = None,
    keep: str | None = None,
    format: str | None = None,
    ignore_key: Sequence[str] = (),
    shard: Shard | str | None = None,
    scheduler: str | None = None,
    output: None = None,
    overwrite: bool = False,
    revision: str | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> FusePlan: ...
def info(
    source: str | os.PathLike[str] | Adapter,
    *,
    format: str | None = None,
    carry_unknown: bool = False,
    ignore_key: Sequence[str] = (),
    revision: str | None = None,
) -> InfoResult: ...
def read(
    path: str | os.PathLike[str],
    *,
    format: str | None = None,
    carry_unknown: bool = False,
    ignore_key: Sequence[str] = (),
    revision: str | None = None,
) -> Adapter: ...
def info_base(
    base: str | os.PathLike[str] | Checkpoint, *, revision: str | None = None
) -> BaseInfoResult: ...
def formats(name: str | None = None) -> FormatsResult: ...
def methods(name: str | None = None) -> MethodsResult: ...
def merge(
    adapters: str
    | os.PathLike[str]
    | Adapter
    | Mapping[str, float]
    | Mapping[Path, float]
    | Sequence[str | os.PathLike[str] | Adapter | tuple[str | os.PathLike[str] | Adapter, float]],
    *,
    base: str | os.PathLike[str] | Checkpoint | None = None,
    method: str = "linear",
    space: Literal["full", "core"] = "full",
    weight_pattern: Sequence[Override | str] = (),
    replacements: str | None = None,
    linear_differences: bool = False,
    force_base: bool = False,
    allow_missing: bool = False,
    density: float | str | None = None,
    lambda_: float | None = None,
    majority_sign: Literal["total", "frequency"] | None = None,
    flavor: Literal["peft", "paper", "mergekit"] | None = None,
    normalize: bool = False,
    set: Sequence[tuple[str, Any] | str] | Mapping[str, Any] = (),
    rank: int | None = None,
    energy: float | str | None = None,
    sv_ratio: float | None = None,
    sv_fro: float | str | None = None,
    sv_cumulative: float | str | None = None,
    threshold: bool = False,
    budget: Budget | str | float | None = None,
    max_rank: int | None = None,
    min_rank: int | None = None,
    rank_pattern: Sequence[tuple[str, int] | str] | Mapping[str, int] = (),
    uniform: bool = False,
    serve_ranks: bool = False,
    workers: int | None = None,
    device: Literal["cpu", "cuda", "mps"] = "cpu",
    dtype: Literal["f32", "f16", "bf16"] | None = None,
    svd: Literal["exact", "rsvd"] = "exact",
    oversample: int = 10,
    power_iterations: int = 2,
    seed: int = 0,
    keep_alpha: bool = False,
    drop: str | None = None,
    keep: str | None = None,
    format: str | None = None,
    carry_unknown: bool = False,
    ignore_key: Sequence[str] = (),
    output: str | os.PathLike[str] | None = None,
    overwrite: bool = False,
    max_error: float | str | None = None,
    revision: str | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> MergeResult: ...
def plan_squeeze(
    *,
    start: int | None = None,
    target: int | None = None,
    stages: int | None = None,
    steps: int | None = None,
    allot: Literal["equal", "rank"] = "equal",
    least_steps: int = 200,
    trainer: Literal["transformers", "axolotl", "llama-factory"] = "transformers",
) -> PlanSqueezeResult: ...
def provenance(path: str | os.PathLike[str]) -> ProvenanceResult: ...
def push(
    source: str | os.PathLike[str] | Adapter,
    repo: str,
    *,
    create: bool = False,
    private: bool = False,
    branch: str | None = None,
    create_pr: bool = False,
    message: str | None = None,
    base_model: str | None = None,
    card: str | os.PathLike[str] | None = None,
    no_card: bool = False,
    no_check: bool = False,
    fail_on: Literal["error", "warning", "note", "never"] | None = None,
    target: Sequence[str] = (),
    dry_run: bool = False,
    workers: int | None = None,
    revision: str | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> PushResult: ...
def quantize(
    base: str | os.PathLike[str] | Checkpoint,
    *,
    quant_type: Literal["nf4", "fp4"] = "nf4",
    blocksize: int = 64,
    double_quant: bool = True,
    max_shard_size: int | str | None = None,
    exclude: Sequence[str] = (),
    experts: bool = False,
    workers: int | None = None,
    output: str | os.PathLike[str] | None = None,
    overwrite: bool = False,
    revision: str | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> QuantizeResult: ...
def repair(
    source: str | os.PathLike[str] | Adapter,
    *,
    base: str | os.PathLike[str] | Checkpoint | None = None,
    keep_intruders: bool = False,
    lambda_: float = 0.75,
    keep_every_rank: bool = False,
    drop_dead: bool = False,
    rebalance: bool = False,
    intruders: int = 10,
    epsilon: float = 0.5,
    exact_svd: bool = False,
    cache: str | os.PathLike[str] | None = None,
    dtype: Literal["f32", "f16", "bf16"] | None = None,
    workers: int | None = None,
    include: str | None = None,
    exclude: str | None = None,
    format: str | None = None,
    carry_unknown: bool = False,
    ignore_key: Sequence[str] = (),
    output: str | os.PathLike[str] | None = None,
    overwrite: bool = False,
    in_place: bool = False,
    max_error: float | str | None = None,
    revision: str | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> RepairResult: ...
def spectrum(
    source: str | os.PathLike[str] | Adapter,
    *,
    base: str | os.PathLike[str] | Checkpoint | None = None,
    set: Sequence[tuple[str, str] | str] | Mapping[str, str] = (),
    entries: bool = False,
    against: str | os.PathLike[str] | None = None,
    intruders: int = 10,
    epsilon: float = 0.5,
    exact_svd: bool = False,
    cache: str | os.PathLike[str] | None = None,
    include: str | None = None,
    exclude: str | None = None,
    workers: int | None = None,
    format: str | None = None,
    carry_unknown: bool = False,
    ignore_key: Sequence[str] = (),
    revision: str | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> SpectrumResult: ...
def squeeze(
    source: str | os.PathLike[str] | Adapter,
    *,
    rank: int | None = None,
    energy: float | str | None = None,
    sv_ratio: float | None = None,
    sv_fro: float | str | None = None,
    sv_cumulative: float | str | None = None,
    threshold: bool = False,
    budget: Budget | str | float | None = None,
    max_rank: int | None = None,
    min_rank: int | None = None,
    rank_pattern: Sequence[tuple[str, int] | str] | Mapping[str, int] = (),
    uniform: bool = False,
    serve_ranks: bool = False,
    workers: int | None = None,
    device: Literal["cpu", "cuda", "mps"] = "cpu",
    dtype: Literal["f32", "f16", "bf16"] | None = None,
    svd: Literal["exact", "rsvd"] = "exact",
    oversample: int = 10,
    power_iterations: int = 2,
    seed: int = 0,
    keep_alpha: bool = False,
    include: str | None = None,
    exclude: str | None = None,
    drop: str | None = None,
    keep: str | None = None,
    stats: str | os.PathLike[str] | None = None,
    initial: str | os.PathLike[str] | Adapter | None = None,
    format: str | None = None,
    carry_unknown: bool = False,
    ignore_key: Sequence[str] = (),
    output: str | os.PathLike[str] | None = None,
    overwrite: bool = False,
    in_place: bool = False,
    max_error: float | str | None = None,
    revision: str | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> SqueezeResult: ...
def squeeze_choices(
    source: str | os.PathLike[str] | Adapter,
    *,
    workers: int | None = None,
    device: Literal["cpu", "cuda", "mps"] = "cpu",
    dtype: Literal["f32", "f16", "bf16"] | None = None,
    svd: Literal["exact", "rsvd"] = "exact",
    oversample: int = 10,
    power_iterations: int = 2,
    seed: int = 0,
    keep_alpha: bool = False,
    include: str | None = None,
    exclude: str | None = None,
    drop: str | None = None,
    keep: str | None = None,
    initial: str | os.PathLike[str] | Adapter | None = None,
    format: str | None = None,
    carry_unknown: bool = False,
    ignore_key: Sequence[str] = (),
    revision: str | None = None,
) -> SqueezeChoices: ...
def delta(
    adapter: Adapter,
    name: str,
    *,
    dtype: type[Any] | np.dtype[Any] | str = ...,
    base: str | os.PathLike[str] | Checkpoint | None = None,
    revision: str | None = None,
) -> Any: ...
def factors(adapter: Adapter, name: str) -> tuple[Any, Any]: ...
def from_factors(
    modules: Mapping[str, tuple[Any, Any]],
    *,
    alpha: float | None = None,
    base_model: str | None = None,
) -> Adapter: ...
def to_dora(
    source: str | os.PathLike[str] | Adapter,
    *,
    base: str | os.PathLike[str] | Checkpoint,
    initial: str | os.PathLike[str] | Adapter | None = None,
    workers: int | None = None,
    format: str | None = None,
    carry_unknown: bool = False,
    ignore_key: Sequence[str] = (),
    output: str | os.PathLike[str] | None = None,
    overwrite: bool = False,
    in_place: bool = False,
    revision: str | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> ToDoraResult: ...
def to_lora(
    source: str | os.PathLike[str] | Adapter,
    *,
    base: str | os.PathLike[str] | Checkpoint | None = None,
    initial: str | os.PathLike[str] | Adapter | None = None,
    set: Sequence[tuple[str, str] | str] | Mapping[str, str] = (),
    exact: bool = False,
    rank: int | None = None,
    energy: float | str | None = None,
    sv_ratio: float | None = None,
    sv_fro: float | str | None = None,
    sv_cumulative: float | str | None = None,
    threshold: bool = False,
    budget: Budget | str | float | None = None,
    max_rank: int | None = None,
    min_rank: int | None = None,
    rank_pattern: Sequence[tuple[str, int] | str] | Mapping[str, int] = (),
    uniform: bool = False,
    serve_ranks: bool = False,
    workers: int | None = None,
    device: Literal["cpu", "cuda", "mps"] = "cpu",
    dtype: Literal["f32", "f16", "bf16"] | None = None,
    svd: Literal["exact", "rsvd"] = "exact",
    oversample: int = 10,
    power_iterations: int = 2,
    seed: int = 0,
    keep_alpha: bool = False,
    drop: str | None = None,
    keep: str | None = None,
    format: str | None = None,
    carry_unknown: bool = False,
    ignore_key: Sequence[str] = (),
    output: str | os.PathLike[str] | None = None,
    overwrite: bool = False,
    in_place: bool = False,
    max_error: float | str | None = None,
    revision: str | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> ToLoraResult: ...
def to_lora_choices(
    source: str | os.PathLike[str] | Adapter,
    *,
    base: str | os.PathLike[str] | Checkpoint | None = None,
    initial: str | os.PathLike[str] | Adapter | None = None,
    set: Sequence[tuple[str, str] | str] | Mapping[str, str] = (),
    workers: int | None = None,
    device: Literal["cpu", "cuda", "mps"] = "cpu",
    dtype: Literal["f32", "f16", "bf16"] | None = None,
    svd: Literal["exact", "rsvd"] = "exact",
    oversample: int = 10,
    power_iterations: int = 2,
    seed: int = 0,
    keep_alpha: bool = False,
    drop: str | None = None,
    keep: str | None = None,
    format: str | None = None,
    carry_unknown: bool = False,
    ignore_key: Sequence[str] = (),
    revision: str | None = None,
) -> ToLoraChoices | None: ...
def verify(
    fused: str | os.PathLike[str] | Checkpoint,
    *,
    base: str | os.PathLike[str] | Checkpoint,
    adapters: str
    | os.PathLike[str]
    | Adapter
    | Mapping[str, float]
    | Mapping[Path, float]
    | Sequence[str | os.PathLike[str] | Adapter | tuple[str | os.PathLike[str] | Adapter, float]],
    workers: int | None = None,
    format: str | None = None,
    ignore_key: Sequence[str] = (),
    revision: str | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> VerifyResult: ...
def fleet(
    verb: str,
    sources: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    settings: Mapping[str, Any] | None = None,
    *,
    output: str | os.PathLike[str] | None = None,
    shard: Shard | str | None = None,
    workers: int | None = None,
    scheduler: str | None = None,
    memory_limit: int | str | None = None,
    fail_fast: bool = False,
    overwrite: bool = False,
    dry_run: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> FleetResult: ...
def replay(
    path: str | os.PathLike[str],
    *,
    input: Sequence[str | os.PathLike[str]] = (),
    output: str | os.PathLike[str] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> ReplayResult: ...
def run(
    recipe: str | os.PathLike[str],
    *,
    output: str | os.PathLike[str] | None = None,
    only: str | None = None,
    set: Sequence[tuple[str, Any] | str] | Mapping[str, Any] = (),
    dry_run: bool = False,
    overwrite: bool = False,
    workers: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> RunResult: ...
