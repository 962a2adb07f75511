"""The embedded engine: samples from the trainer's own Megatron modules, in the trainer's processes.

All ranks of a data-parallel replica call generate together. Under pipeline parallelism the sequences are
dealt into as many groups as there are stages, so that every stage works on one group while the others
travel; under tensor parallelism each rank decodes its heads and vocabulary rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property, partial
from itertools import chain

import torch
import torch.distributed as dist
from torch import Tensor

from hpt_mega.megatron import experts
from hpt_mega.megatron.decoding import Decoder, KVCache, NextToken, hidden_slots
from hpt_mega.megatron.model import PolicyModel
from hpt_mega.megatron.runtime import Layout
from hpt_mega.rollout.engine import Collect, Sample, SamplingParams
from hpt_mega.rollout.sampling import sample_tokens, uniform_draws

_COMPACT_BELOW = 0.85  # share of unfinished rows below which a group's finished rows leave its batch
_MAX_SENDS_IN_FLIGHT = 64


class MegatronEngine:
    """In-process rollouts with a KV cache; the weights served are always the trainer's current ones."""

    def __init__(self, model: PolicyModel, layout: Layout, *, vocab_size: int, max_sequences: int) -> None:
        self._model = model
        self._layout = layout
        self._vocab_size = vocab_size
        self._max_sequences = max_sequences
        self._version = 0
        group = experts.ranks().group if model.config.num_moe_experts else None
        self._expert_group = group if group is not None and group.size() > 1 else None

    @cached_property
    def _decoders(self) -> list[Decoder]:
        return [Decoder(chunk) for chunk in self._model.chunks]

    def update_weights(self, policy_version: int) -> dict[str, float]:
        """Nothing moves: trainer and engine share the tensors."""
        self._version = policy_version
        return {}

    def sleep(self) -> None:
        """It holds no memory between calls."""

    def close(self) -> None:
        """Nothing was started."""

    def generate(self, prompts: Sequence[Sequence[int]], sampling: SamplingParams) -> list[list[Sample]]:
        uniforms = uniform_draws(len(prompts) * sampling.n, sampling.max_new_tokens, sampling.seed)
        per_wave = max(1, self._max_sequences // sampling.n)
        results: list[list[Sample]] = []
        with torch.no_grad(), self._model.inference():
            for start in range(0, len(prompts), per_wave):
                wave = [list(prompt) for prompt in prompts[start : start + per_wave]]
                rows = slice(start * sampling.n, (start + len(wave)) * sampling.n)
                results += self._generate_wave(wave, uniforms[rows], sampling)
            if self._expert_group is not None:
                self._keep_company()
        if self._layout.cp_size > 1:  # its ranks decoded the same; let none differ in a last bit
            results = self._layout.broadcast_object(results)
        return results

    def submit(self, prompts: Sequence[Sequence[int]], sampling: SamplingParams) -> Collect:
        """Nothing runs beside training: the samples are drawn when they are collected."""
        return partial(self.generate, prompts, sampling)

    def _generate_wave(
        self, prompts: list[list[int]], uniforms: Tensor, sampling: SamplingParams
    ) -> list[list[Sample]]:
        groups = self._deal(prompts, uniforms, sampling)
        pending: list[dist.Work] = []
        while any(group.active for group in groups):
            for number in range(len(self._model.chunks)):
                for group in groups:
                    if number == 0 and group.active and not group.in_prefill:
                        self._collect(group, sampling)
                    if group.active:
                        self._advance(group, number, sampling, pending)
        for work in pending:
            work.wait()
        by_prompt: dict[int, list[Sample]] = {}
        for group in groups:
            for row, prompt in enumerate(group.prompt_of_row):
                by_prompt.setdefault(prompt, []).append(group.sample(row, self._version))
        return [by_prompt[i] for i in range(len(prompts))]

    def _deal(self, prompts: list[list[int]], uniforms: Tensor, sampling: SamplingParams) -> list[_Group]:
        """Long and short prompts alternate between the groups, so that their work is alike."""
        order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
        groups, device, dtype = [], self._layout.device, self._model.config.params_dtype
        for index in range(min(self._layout.pp_size, len(prompts))):
            members = order[index :: self._layout.pp_size]
            rows = [i * sampling.n + j for i in members for j in range(sampling.n)]
            own = [prompts[i] for i in members]
            groups.append(_Group(index, members, own, uniforms[rows], sampling.n, device, dtype))
        return groups

    def _advance(
        self, group: _Group, number: int, sampling: SamplingParams, pending: list[dist.Work]
    ) -> None:
        """Run a chunk of this stage on the group's prompts, or next position; pass on what the next needs."""
        layout, chunk = self._layout, self._model.chunks[number]
        tokens, positions = group.next_inputs()
        hidden = None
        if not chunk.pre_process:
            shape = (tokens.shape[1], tokens.shape[0], chunk.config.hidden_size)
            hidden = torch.empty(shape, dtype=chunk.config.params_dtype, device=layout.device)
            source = layout.stage_rank((layout.pp_rank - 1) % layout.pp_size)
            dist.recv(hidden, source, layout.pp_group, tag=group.index)
        if self._expert_group is not None:
            self._announce(True)
        if group.in_prefill:
            chunk.set_input_tensor(hidden)
            with group.lend_caches(chunk):
                hidden = chunk(tokens, positions, None)
        else:
            if hidden is None:
                hidden = chunk.embedding(input_ids=tokens, position_ids=positions)
            token = group.next_token(chunk.rotary_angles(positions))
            hidden = self._decoders[number](hidden, token, group.caches[number])
        if chunk.post_process:
            group.drawn = self._draw(group, hidden, sampling)
            for stage in range(layout.pp_size - 1):
                pending.append(
                    dist.isend(group.drawn, layout.stage_rank(stage), layout.pp_group, tag=group.index)  # type: ignore[arg-type]
                )
        else:
            target = layout.stage_rank((layout.pp_rank + 1) % layout.pp_size)
            pending.append(
                dist.isend(hidden.contiguous(), target, layout.pp_group, tag=group.index)  # type: ignore[arg-type]
            )
        while len(pending) > _MAX_SENDS_IN_FLIGHT:
            pending.pop(0).wait()
        if number == len(self._model.chunks) - 1:
            group.after_forward()

    def _announce(self, working: bool) -> bool:
        """Before each forward through experts: whether any rank that shares them still has work.

        Their exchange needs all ranks, whatever each has to decode; the n-th forwards of all of them meet.
        """
        flag = torch.tensor(int(working), device=self._layout.device)
        dist.all_reduce(flag, op=dist.ReduceOp.MAX, group=self._expert_group)
        return bool(flag)

    def _keep_company(self) -> None:
        """Take part in the experts' exchange until the last replica that shares them has its samples."""
        config, device = self._model.config, self._layout.device
        token = torch.zeros(1, 1, dtype=torch.long, device=device)
        while self._announce(False):
            if not self._model.pre_process:
                hidden = torch.zeros(1, 1, config.hidden_size, dtype=config.params_dtype, device=device)
                self._model.set_input_tensor(hidden)
            self._model(token, torch.zeros_like(token), None)

    def _draw(self, group: _Group, hidden_SBH: Tensor, sampling: SamplingParams) -> Tensor:
        """[2, rows] fp64: the next token of every row, and its log-probability."""
        rows = torch.arange(hidden_SBH.shape[1])
        hidden_BH = hidden_SBH[group.last_positions(), rows]
        logits_BV = hidden_BH @ self._model.chunks[-1].output_weight().t()
        if self._layout.tp_size > 1:
            shards = [torch.empty_like(logits_BV) for _ in range(self._layout.tp_size)]
            dist.all_gather(shards, logits_BV.contiguous(), group=self._layout.tp_group)
            logits_BV = torch.cat(shards, dim=1)
        logits_BV = logits_BV[:, : self._vocab_size]
        if group.in_prefill:  # one row a prompt so far: every sample starts from its prompt's logits
            logits_BV = logits_BV.repeat_interleave(group.samples_per_prompt, dim=0)
        tokens, logp = sample_tokens(logits_BV, group.uniforms(), sampling.temperature, sampling.top_p)
        drawn = torch.stack((tokens.double(), logp.double()))
        if self._layout.tp_size > 1:  # one rank decides, whatever the last bit of an all-gather
            source = dist.get_global_rank(self._layout.tp_group, 0)
            dist.broadcast(drawn, src=source, group=self._layout.tp_group)
        return drawn

    def _collect(self, group: _Group, sampling: SamplingParams) -> None:
        """Learn what the last stage drew for the group, and let finished rows leave."""
        layout = self._layout
        if layout.is_last_stage:
            drawn = group.drawn
        else:
            drawn = torch.empty(2, len(group.rows), dtype=torch.float64, device=layout.device)
            dist.recv(drawn, layout.stage_rank(layout.pp_size - 1), layout.pp_group, tag=group.index)
        assert drawn is not None
        group.record(drawn, sampling)


@dataclass
class _Group:
    """The sequences that travel together through the pipeline. The same on every stage of a replica.

    `rows` are the indices of the sequences still in the batch; row r is sample r % n of prompt r // n. The
    books are kept on the CPU; what the model computes with is on `device`.
    """

    index: int
    members: list[int]
    prompts: list[list[int]]
    all_uniforms: Tensor
    samples_per_prompt: int
    device: torch.device
    dtype: torch.dtype
    caches: list[list[KVCache]] = field(default_factory=list)  # of each chunk's layers
    drawn: Tensor | None = None
    step: int = 0  # tokens drawn so far
    in_prefill: bool = True

    def __post_init__(self) -> None:
        count, longest_response = self.all_uniforms.shape
        self.rows = torch.arange(count)
        self.unfinished = torch.ones(count, dtype=torch.bool)  # over rows still in the batch
        self.tokens = torch.zeros(count, longest_response, dtype=torch.long)
        self.logp = torch.zeros(count, longest_response, dtype=torch.float64)
        self.lengths = torch.zeros(count, dtype=torch.long)
        self.stopped = torch.zeros(count, dtype=torch.bool)
        self.prompt_lengths = torch.tensor([len(prompt) for prompt in self.prompts])
        self.longest_prompt = int(self.prompt_lengths.max())
        slots = self.longest_prompt + longest_response
        self.hidden_slots = hidden_slots(self.prompt_lengths, slots, self.dtype).to(self.device)

    @property
    def active(self) -> bool:
        return bool(self.unfinished.any())

    @property
    def prompt_of_row(self) -> Iterator[int]:
        return (member for member in self.members for _ in range(self.samples_per_prompt))

    def next_inputs(self) -> tuple[Tensor, Tensor]:
        """Token and position ids [B, S]: the right-padded prompts first, then one token a row."""
        if not self.in_prefill:
            positions = self.prompt_lengths[self.rows // self.samples_per_prompt] + self.step - 1
            newest = self.tokens[self.rows, self.step - 1]
            return newest[:, None].to(self.device), positions[:, None].to(self.device)
        tokens = torch.zeros(len(self.prompts), self.longest_prompt, dtype=torch.long)
        for row, prompt in enumerate(self.prompts):
            tokens[row, : len(prompt)] = torch.tensor(prompt)
        return tokens.to(self.device), torch.arange(self.longest_prompt, device=self.device)[None]

    def last_positions(self) -> Tensor:
        """Index into the forward's sequence dimension of each row's newest token."""
        if self.in_prefill:
            return self.prompt_lengths - 1
        return torch.zeros(len(self.rows), dtype=torch.long)

    def uniforms(self) -> Tensor:
        return self.all_uniforms[self.rows, self.step].to(self.device)

    def next_token(self, angles_1B1D: Tensor) -> NextToken:
        """Where each row's newest token is in the caches and in its sequence."""
        return NextToken(self.longest_prompt + self.step - 1, self.hidden_slots, angles_1B1D)

    @contextmanager
    def lend_caches(self, chunk: PolicyModel) -> Iterator[None]:
        """While the prompts run through a chunk, its attention layers have empty caches to fill.

        The caches grow to one row a sample once the prompts are in.
        """
        config, layers = chunk.config, chunk.core_attentions()
        groups = config.num_query_groups // config.tensor_model_parallel_size
        shape = (len(self.prompts), groups, self.hidden_slots.shape[-1], config.kv_channels)
        caches = [
            KVCache(*(torch.zeros(shape, dtype=self.dtype, device=self.device) for _ in range(2)))
            for _ in layers
        ]
        for layer, cache in zip(layers, caches, strict=True):
            layer.cache = cache
        try:
            yield
        finally:
            for layer in layers:
                layer.cache = None
        self.caches.append(caches)

    def after_forward(self) -> None:
        if self.in_prefill:
            self._select(self.rows // self.samples_per_prompt)
            self.in_prefill = False

    def record(self, drawn: Tensor, sampling: SamplingParams) -> None:
        """Note the tokens that were drawn for the rows, then compact the batch if it pays."""
        tokens, logp = drawn[0].long().cpu(), drawn[1].cpu()
        self.tokens[self.rows, self.step], self.logp[self.rows, self.step] = tokens, logp
        self.step += 1
        self.lengths[self.rows[self.unfinished]] = self.step
        stops = self.unfinished & torch.isin(tokens, torch.tensor(sampling.stop_tokens, dtype=torch.long))
        self.stopped[self.rows[stops]] = True
        self.unfinished &= ~stops
        if self.step == sampling.max_new_tokens:
            self.unfinished.zero_()
        if self.active and self.unfinished.float().mean() < _COMPACT_BELOW:
            self._compact()

    def _compact(self) -> None:
        keep = self.unfinished.nonzero()[:, 0]
        self._select(keep)
        self.rows, self.unfinished = self.rows[keep], self.unfinished[keep]

    def _select(self, rows: Tensor) -> None:
        places = rows.to(self.device)
        self.hidden_slots = self.hidden_slots.index_select(0, places)
        for cache in chain.from_iterable(self.caches):
            cache.select(places)

    def sample(self, row: int, version: int) -> Sample:
        length = int(self.lengths[row])
        tokens, logp = self.tokens[row, :length].tolist(), self.logp[row, :length].tolist()
        return Sample(tuple(tokens), tuple(logp), bool(self.stopped[row]), version)
