"""The sections of the config: models, servers, data, and how they are used."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, field_validator, model_validator

from megatron_opd.config.base import Port, PositiveFloat, PositiveInt, Real, Section
from megatron_opd.config.recipe import LazyConfig
from megatron_opd.config.servers import ServerConfig


class StudentConfig(Section):
    """The model that learns."""

    model: Path
    """Hugging Face checkpoint folder that the student starts from."""
    tensor_parallel: PositiveInt = 1
    """Ranks that share every matrix."""
    pipeline_parallel: PositiveInt = 1
    """Stages that share the layers; micro-batches pass from stage to stage (1F1B)."""
    virtual_pipeline: PositiveInt = 1
    """Parts of the layers that each stage holds; more than 1 interleaves them, which shortens the pipeline's bubble."""
    context_parallel: PositiveInt = 1
    """Ranks that split the tokens of every sequence."""
    data_parallel: PositiveInt = 1
    """Copies of the student that split a batch."""
    expert_parallel: PositiveInt = 1
    """Ranks, out of data_parallel * context_parallel, that share the experts of a mixture-of-experts layer."""
    expert_tensor_parallel: PositiveInt | None = None
    """Ranks that share the matrices of one expert; null takes tensor_parallel."""
    sequence_parallel: bool = False
    """Whether tensor-parallel ranks also split the tokens between matrices."""
    recompute: Literal["none", "selective", "full"] = "none"
    """What the backward pass computes again instead of keeping: nothing, the attention, or whole layers."""
    overlap_gradients: bool = False
    """Whether gradients are reduced over copies while the backward pass still runs."""
    overlap_parameters: bool = False
    """Whether updated weights are gathered while the next forward pass runs; needs overlap_gradients."""
    backend: Literal["auto", "transformer_engine", "torch"] = "auto"
    """Layers: Transformer Engine, or plain torch; auto takes Transformer Engine where a GPU and the package are."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Precision of weights and matrix products; gradients and optimizer state are float32 in both."""
    fp8: Literal["hybrid", "e4m3"] | None = None
    """8-bit format of Transformer Engine's matrix products; hybrid has e5m2 gradients; null keeps those of dtype."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where ranks run; auto takes a GPU when there is one."""
    threads_per_rank: PositiveInt = 1
    """CPU threads of one rank."""
    row_tokens: PositiveInt = 4096
    """Most tokens in one packed row: one micro-batch, which all ranks of a copy share."""
    train_vision: bool = False
    """Whether the vision tower of a multimodal student is trained too; else it stays as it was loaded."""

    @property
    def ranks(self) -> int:
        """Processes of the student."""
        return self.tensor_parallel * self.pipeline_parallel * self.context_parallel * self.data_parallel

    @property
    def expert_tensor(self) -> int:
        """Ranks that share the matrices of one expert."""
        return self.expert_tensor_parallel or self.tensor_parallel

    @property
    def copies(self) -> int:
        """Ranks that hold the same dense weights, over which gradients are summed and optimizer state is split."""
        return self.data_parallel * self.context_parallel


class OptimizerConfig(Section):
    """Megatron's Adam and its scheduler."""

    lr: PositiveFloat = 1e-6
    """Peak learning rate."""
    min_lr: Annotated[float, Field(ge=0)] = 0.0
    """Learning rate at the end of a decaying schedule."""
    schedule: Literal["constant", "cosine", "linear"] = "constant"
    """How the rate goes from lr to min_lr after the warm-up."""
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    """Steps during which the rate grows linearly from 0 to lr."""
    adam_beta1: float = 0.9
    """Decay of the first moment."""
    adam_beta2: float = 0.98
    """Decay of the second moment."""
    adam_eps: float = 1e-8
    """Added to the root of the second moment."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.1
    """Decoupled weight decay."""
    clip_grad: Annotated[float, Field(ge=0)] = 1.0
    """Largest norm of the gradient; 0 turns clipping off."""


class RolloutConfig(Section):
    """How the student is sampled."""

    prompts_per_step: PositiveInt = 64
    """Prompts drawn for one optimizer step."""
    samples_per_prompt: PositiveInt = 16
    """Rollouts of each prompt: one group."""
    max_new_tokens: PositiveInt = 16384
    """Most tokens of one response."""
    temperature: Real = 1.0
    """Sampling temperature of training; only 1 is taken, at which sampled and recomputed log-probs are the same."""
    max_staleness: Annotated[int, Field(ge=0)] = 0
    """Steps by which the weights that drew a token may be older than those it trains; 0 is strictly on-policy."""
    server: ServerConfig = ServerConfig()
    """The engines that sample."""

    @field_validator("temperature")
    @classmethod
    def _is_one(cls, value: float) -> float:
        if value != 1:
            raise ValueError(
                f"{value:g} is refused: servers return a prompt's log-probs at temperature 1 whatever a request asks "
                "for, so those of the teacher and those of the sampled tokens would be different quantities; leave it "
                "at 1, or change evaluation.temperature if you mean the evaluation"
            )
        return value


class TeacherConfig(Section):
    """One frozen expert."""

    model: Path
    """Hugging Face checkpoint folder of the teacher; its tokenizer must equal the student's."""
    other_template: bool = False
    """Whether its chat template may differ from the student's, with which it is asked all the same."""
    images: Literal["send", "leave_out"] = "send"
    """Whether it sees a prompt's images; leave_out takes them and their tokens out of what it is asked."""
    server: ServerConfig = ServerConfig()
    """The engines that score."""


class ColumnsConfig(Section):
    """Which column of a prompt file holds what."""

    prompt: str = "prompt"
    """Text of the question, or a list of chat messages with role and content."""
    answer: str = "answer"
    """Reference for the verifier."""
    domain: str | None = "domain"
    """Domain of the record; null when the file has none, and default_domain holds for all."""
    id: str | None = None
    """Unique name of the record; null names it file:line."""
    repeats: str | None = None
    """How often the record appears in one epoch (``megatron-opd difficulty`` writes it); null: once."""
    images: str | None = None
    """Images of the record, one or a list: a path, bytes, base64, or an object with one of them; null: none."""


class StreamConfig(Section):
    """A training file that is not read into memory (docs/data.md)."""

    window_mb: PositiveInt = 32
    """Megabytes (2**20 bytes) of the file that are shuffled together; they are taken from all over it."""
    max_bad_share: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of the records drawn that may be unusable, of at least 1000; they are passed over and logged."""


class ImagesConfig(Section):
    """What images of prompts may be, and to which size they are brought (docs/multimodal.md)."""

    folder: Path | None = None
    """Where resized images are kept, by their hash, for all processes and runs; null: .images beside the runs."""
    max_per_prompt: PositiveInt = 16
    """Most images of one prompt; more are an error."""
    max_file_mb: PositiveInt = 32
    """Most megabytes (2**20 bytes) of one image as it is in the data; a larger one is an error."""
    max_source_megapixels: Annotated[int, Field(ge=1, le=170)] = 80
    """Most million pixels of one image as it is in the data; a larger one is an error and is never decoded."""
    min_pixels: PositiveInt | None = None
    """Pixels to which a smaller image is enlarged; null: as the student's image processor says."""
    max_pixels: PositiveInt | None = None
    """Pixels to which a larger image is shrunk; null: as the student's image processor says."""


class DataConfig(Section):
    """Prompts to train on and to evaluate on."""

    train: Path
    """JSONL or parquet file of training prompts."""
    eval: Path | None = None
    """Held-out prompts of the evaluation; null evaluates nothing."""
    columns: ColumnsConfig = ColumnsConfig()
    """Column map of the training file."""
    eval_columns: ColumnsConfig | None = None
    """Column map of the evaluation file; null uses columns."""
    default_domain: str | None = None
    """Domain of records without one; null makes such a record an error."""
    max_prompt_tokens: PositiveInt = 4096
    """Most tokens of a prompt after the chat template; a longer one is an error."""
    lazy: LazyConfig | None = None
    """Draw prompts by what is known of their difficulty; null draws each prompt equally often."""
    mixture: dict[str, PositiveFloat] | None = None
    """Domain to its share of the prompts drawn, by ratio; null draws domains as often as the file has them."""
    stream: StreamConfig | None = None
    """Read the training file while it is used, whatever its size; null reads and checks all of it at the start."""
    images: ImagesConfig = ImagesConfig()
    """Images of prompts; only a multimodal student has any."""

    @model_validator(mode="after")
    def _streams_fit(self) -> Self:
        if self.stream is not None and self.lazy is not None:
            raise ValueError("lazy needs to know all prompts: leave stream or lazy out")
        if self.stream is not None and self.columns.id is None:
            raise ValueError(
                "stream needs columns.id, since the number of a line is not known: megatron-opd prepare writes id"
            )
        return self

    @property
    def has_images(self) -> bool:
        """Whether prompts may have images."""
        return any(columns.images for columns in (self.columns, self.eval_columns) if columns is not None)


class JudgeConfig(Section):
    """The language model that the verifier "judge" asks."""

    url: str
    """Address of a server with OpenAI's chat completions, without /v1."""
    model: str
    """Name of the model, as the server knows it."""
    token_env: str | None = None
    """Environment variable that holds the server's bearer token; null sends none."""
    max_tokens: PositiveInt = 1024
    """Most tokens of the judge's answer, which ends with its verdict."""


VerifierKind = Literal["math", "code", "choice", "exact", "numeric", "chartqa", "anls", "ifeval", "judge", "none"]


class VerifierConfig(Section):
    """How outcomes are decided: one verifier for each domain."""

    kinds: dict[str, VerifierKind] = {"math": "math", "code": "code"}
    """Domain to verifier; "none" answers unknown."""
    workers: PositiveInt = 1
    """Processes that verify."""
    timeout_s: PositiveFloat = 5.0
    """Longest time for one response; a verification that takes longer is unknown."""
    sandbox: Literal["best", "bubblewrap", "namespaces", "limits"] = "best"
    """How code is fenced in; "best" takes the strongest that works on this machine, any other must work."""
    anls_threshold: Annotated[float, Field(ge=0, lt=1)] = 0.5
    """Similarity that an answer of the verifier "anls" must exceed."""
    judge: JudgeConfig | None = None
    """Server of the verifier "judge"; null where no domain uses it."""

    @model_validator(mode="after")
    def _judge_has_a_server(self) -> Self:
        domains = sorted(domain for domain, kind in self.kinds.items() if kind == "judge")
        if domains and self.judge is None:
            raise ValueError(f"kinds.{domains[0]} is judge: set judge.url and judge.model")
        return self


class ScoringConfig(Section):
    """What is asked of teachers, and what happens when an answer cannot be used (docs/teachers.md)."""

    max_dropped_share: Annotated[float, Field(ge=0, le=1)] = 0.05
    """The run stops when a larger share of the rollouts that a step asks teachers to score is dropped."""
    attempts: PositiveInt = 4
    """Tries for one request before its rollout is dropped; they go to different replicas where there are several."""
    probe_tolerance: PositiveFloat = 1e-3
    """Largest difference between ways to score one sequence at the start; meant for float32, bfloat16 needs 0.1."""
    top_k: Annotated[int, Field(ge=0)] = 0
    """Most likely tokens of teacher and student that are fetched at each position; 0 fetches none."""


class RefreshConfig(Section):
    """How the rollout engines get new weights (docs/refresh.md)."""

    mode: Literal["broadcast", "disk", "tensor"] = "broadcast"
    """Way of transport: a process group that spans trainer and engines, files, or shared memory of one machine."""
    pause: Literal["none", "retract", "in_place"] = "none"
    """Responses under way: none waits for their end, retract computes their cache anew, in_place keeps it."""
    host: str | None = None
    """Address of the trainer's first rank, as engines reach it; null: loopback, or its node's in a SLURM job."""
    port: Port = 0
    """Port at which they meet; 0 takes a free one."""
    folder: Path | None = None
    """Folder of mode disk, with one for each run in it; all engines see it under the same path. null: the run's own."""
    bucket_mb: PositiveInt = 256
    """Most megabytes of weights that are under way at once; twice as many are in memory."""
    probe_tolerance: PositiveFloat = 1e-4
    """Largest difference of log-probs between engine and trainer on the probe sequence; 1e-4 is meant for float32."""
    timeout_s: PositiveFloat = 300.0
    """Longest wait for one answer of an engine during a refresh."""
    recovery_s: PositiveFloat = 300.0
    """Longest wait for an engine to come back when none can be reached; then the run stops."""

    @property
    def bucket_bytes(self) -> int:
        """Most bytes of weights that are under way at once."""
        return self.bucket_mb << 20


class EvalConfig(Section):
    """The evaluation before, in and after training."""

    before: bool = True
    """Whether student and teachers are evaluated before training too."""
    samples_per_prompt: PositiveInt = 1
    """Responses for each held-out prompt."""
    temperature: Annotated[float, Field(ge=0)] = 1.0
    """Sampling temperature; 0 is greedy."""
    teachers: bool = True
    """Whether each teacher is evaluated on its own domain too."""
    every_steps: Annotated[int, Field(ge=0)] = 0
    """Every how many steps the student is evaluated in training; 0: never. Training goes on if max_staleness >= 1."""
    concurrency: PositiveInt = 32
    """Held-out prompts under way at once while training goes on: the rest of the engine is left to rollouts."""
    limit: PositiveInt | None = None
    """Most prompts of each domain; null takes all."""


class CoordinatorConfig(Section):
    """The process in the middle."""

    host: str | None = None
    """Address that it listens on; null: loopback, or its node's in a SLURM job. Every run has a bearer token."""
    port: Port = 0
    """Port that it listens on; 0 takes a free one."""
    watchdog_s: PositiveFloat = 120.0
    """When nothing has moved for so many seconds, the run says who waits for whom."""


class RecordConfig(Section):
    """What a run keeps of its rollouts."""

    trajectories_every: Annotated[int, Field(ge=0)] = 1
    """Every how many steps all rollouts are kept as parquet, for ``megatron-opd audit``; 0 keeps none."""


class SinksConfig(Section):
    """Where metrics go beside ``metrics.jsonl``; a sink that fails or hangs is told and left, and the run goes on."""

    tensorboard: bool = False
    """Write TensorBoard's event files to the run's folder; needs the package tensorboard."""
    wandb: bool = False
    """Report to Weights & Biases, under the run's id; offline without a key; needs the package wandb."""
    wandb_project: str = "megatron_opd"
    """Project at Weights & Biases."""
    wandb_entity: str | None = None
    """User or team at Weights & Biases; null: that of the key."""
    patience_s: PositiveFloat = 120.0
    """A sink that takes longer for a step, or for its end, is left."""


class CheckpointConfig(Section):
    """What a run saves so that it can go on after a crash (docs/operations.md)."""

    every_steps: Annotated[int, Field(ge=0)] = 10
    """Every how many steps everything is saved, and after the last one; 0 saves nothing."""
    keep_last: PositiveInt = 2
    """Newest checkpoints that are kept; with 1 there is none to go back to when the newest is damaged."""
    keep_every: Annotated[int, Field(ge=0)] = 0
    """Checkpoints of every so many steps are kept for good; 0 keeps only the newest."""
    async_save: bool = True
    """Write while the next step goes on; the weights are copied first, which costs their size in main memory."""
    deadline_s: PositiveFloat = 1800.0
    """Longest time for one save; a later one is given up, told, and the run goes on without it."""
    restarts: Annotated[int, Field(ge=0)] = 3
    """How often the run goes on by itself from its newest checkpoint when its coordinator or student dies."""

    def due(self, step: int, *, last: bool) -> bool:
        """Whether the state after ``step`` steps is to be saved."""
        return self.every_steps > 0 and (last or step % self.every_steps == 0)
