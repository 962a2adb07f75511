"""What a step's updates add to one forward-backward: old and reference log-probs, pairs, a critic.

The references are the published losses by plain autograd on transformers' models.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import log_softmax, logsigmoid

from hpt_mega.config import (
    Config,
    CriticConfig,
    OptimizerConfig,
    ParallelConfig,
    PrecisionConfig,
    TrainerConfig,
)
from hpt_mega.trajectory import Source, Trajectory
from tests.megatron.tiny import VOCABULARY, build_policy, leave_job, load_llama, save_llama
from tests.ranks import run_ranks
from tests.repeatable import OnlyRepeatable

LAYOUTS = (
    ParallelConfig(tp=1, pp=2, dp=1),
    ParallelConfig(tp=2, pp=1, dp=1, sequence_parallel=True),
    ParallelConfig(tp=1, pp=1, dp=2),
    ParallelConfig(tp=1, pp=1, dp=1, cp=2),
)
LENGTHS = ((3, 5, 9), (6, 2, 7), (5, 4, 3), (7, 6, 2))  # tokens of a prompt and its two responses
RESPONSES = [response for _, *responses in LENGTHS for response in responses]
BETA, GAMMA, LAMBDA = 0.3, 0.95, 0.8
TOLERANCE = 2e-5  # of the largest gradient


def trajectories() -> list[Trajectory]:
    """Four questions with two responses of unequal reward and length each; the pairs of DPO."""
    generator = torch.Generator().manual_seed(3)
    made = []
    for group, lengths in enumerate(LENGTHS):
        prompt, *responses = (
            tuple(torch.randint(0, VOCABULARY, (length,), generator=generator).tolist()) for length in lengths
        )
        for reward, response in enumerate(responses):
            made.append(
                Trajectory(
                    prompt,
                    response,
                    group=group,
                    source=Source.ONLINE,
                    policy_version=0,
                    rollout_logp=(-1.0,) * len(response),
                    reward=float(reward),
                    pair=group,
                )
            )
    return made


def reference_logp(model: Any, trajectory: Trajectory) -> Tensor:
    tokens = torch.tensor([trajectory.prompt_tokens + trajectory.response_tokens])
    logp = log_softmax(model(tokens).logits[0, :-1], dim=-1)
    start = len(trajectory.prompt_tokens)
    return logp.gather(1, tokens[0, 1:, None])[start - 1 :, 0]


def nudge(parameters: Any) -> None:
    """A second model from the first: each weight scaled by a number that follows from its shape."""
    with torch.no_grad():
        for parameter in parameters:
            parameter.mul_(1.01)


def config(parallel: ParallelConfig, updates: int) -> Config:
    return Config(
        parallel=parallel,
        precision=PrecisionConfig("fp32"),
        optimizer=OptimizerConfig(lr=1e-3, clip_grad=0.0, warmup_steps=0, schedule="constant"),
        critic=CriticConfig(lr=1e-3, clip=0.2),
        trainer=TrainerConfig(tokens_per_microbatch=30, updates_per_step=updates),
    )


def learn(
    folder: Path, name: str, options: dict[str, Any], updates: int, rewards: Sequence[float] = ()
) -> list[dict[str, Any]]:
    """For each layout: what learning from the trajectories once returned, and the gradient it left."""
    from hpt_mega.megatron.critic import ValueModel, build_critic
    from hpt_mega.megatron.learner import Learner
    from hpt_mega.megatron.model import build_model
    from hpt_mega.objective import algorithm

    found = []
    for parallel in LAYOUTS:
        cfg = config(parallel, updates)
        policy = build_policy(folder, cfg)
        layout, shape = policy.layout, policy.shape
        estimator = algorithm(name, **options)
        learner = Learner(cfg, layout, policy.wrapped, policy.optimizer, estimator, shape.vocab_size)
        if estimator.needs_reference_model:
            learner.reference = build_model(shape, parallel, layout, torch.float32)
            learner.reference.load_state_dict(policy.model.state_dict())
            nudge(learner.reference.parameters())
        if estimator.needs_values:
            untied = replace(shape, tied=False)
            model = build_model(untied, parallel, layout, torch.float32, kind=ValueModel)
            learner.critic = build_critic(model, policy.model, cfg, layout)
            if layout.is_last_stage:
                with torch.no_grad():
                    model.output_layer.weight.copy_(head())
        everyone = trajectories()
        if rewards:
            everyone = [replace(t, reward=reward) for t, reward in zip(everyone, rewards, strict=True)]
        share = len(everyone) // layout.dp_size
        mine = everyone[layout.dp_rank * share : (layout.dp_rank + 1) * share]
        scored = learner._score(everyone)
        with OnlyRepeatable():
            metrics = learner.learn(mine, step=0)
        result: dict[str, Any] = {
            "metrics": metrics,
            "old": [list(t.old_logp) for t in scored],
            "ref": [list(t.ref_logp) for t in scored],
            "values": [list(t.values) for t in scored],
            "gradients": policy.gradients(),
        }
        if learner.critic is not None and layout.is_last_stage:
            result["head"] = learner.critic.model.module.output_layer.weight.main_grad.clone()
        found.append(result)
        dist.barrier()
        leave_job()
    return found


def head() -> Tensor:
    return torch.randn(1, 48, generator=torch.Generator().manual_seed(8)) * 0.05


def assert_gradients(found: list[list[dict[str, Any]]], expected: dict[str, Tensor]) -> None:
    """found[rank][layout]; all stages together must hold every gradient of the reference."""
    largest = max(float(gradient.abs().max()) for gradient in expected.values())
    for place, parallel in enumerate(LAYOUTS):
        gradients: dict[str, Tensor] = {}
        for rank in found:
            gradients |= rank[place]["gradients"]
        assert gradients.keys() >= expected.keys() - {"lm_head.weight"}
        for name, gradient in gradients.items():
            difference = float((gradient - expected[name]).abs().max())
            assert difference < TOLERANCE * largest, f"{parallel}: {name} differs by {difference:.1e}"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_llama(tmp_path_factory.mktemp("tiny") / "model", tied=True)


def gradients_of(model: Any, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def test_a_dpo_update_has_the_gradient_of_its_published_loss(folder: Path, tmp_path: Path) -> None:
    found = run_ranks(learn, 2, tmp_path, folder, "dpo", {"beta": BETA}, 1)
    model, reference = load_llama(folder), load_llama(folder)
    nudge({id(p): p for p in reference.parameters()}.values())
    margins = []
    for worse, better in zip(trajectories()[::2], trajectories()[1::2], strict=True):
        with torch.no_grad():
            base = reference_logp(reference, better).sum() - reference_logp(reference, worse).sum()
        margins.append(reference_logp(model, better).sum() - reference_logp(model, worse).sum() - base)
    assert_gradients(found, gradients_of(model, -logsigmoid(BETA * torch.stack(margins)).mean()))
    with torch.no_grad():
        expected = [reference_logp(reference, trajectory).tolist() for trajectory in trajectories()]
    got = found[0][0]["ref"]
    for mine, theirs in zip(got, expected, strict=True):
        assert mine == pytest.approx(theirs, abs=1e-4)


def test_a_ppo_update_has_the_gradients_of_its_published_losses(folder: Path, tmp_path: Path) -> None:
    options = {"gae_gamma": GAMMA, "gae_lambda": LAMBDA}
    found = run_ranks(learn, 2, tmp_path, folder, "ppo", options, 1)
    model, critic = load_llama(folder), load_llama(folder)
    weight = head().requires_grad_()
    policy_loss, critic_loss = torch.zeros(()), torch.zeros(())
    tokens = sum(RESPONSES)
    every_value = []
    for trajectory in trajectories():
        sequence = torch.tensor([trajectory.prompt_tokens + trajectory.response_tokens])
        start = len(trajectory.prompt_tokens)
        values = (critic.model(sequence).last_hidden_state[0] @ weight.t())[start - 1 : -1, 0]
        every_value.append(values.tolist())
        advantage = brute_force_gae(values.tolist(), trajectory.reward)
        returns = advantage + values.detach()
        policy_loss = policy_loss - (advantage * reference_logp(model, trajectory)).sum() / tokens
        critic_loss = critic_loss + (values - returns).square().sum() / 2 / tokens
    assert_gradients(found, gradients_of(model, policy_loss))
    critic_loss.backward()
    assert weight.grad is not None
    for place in range(len(LAYOUTS)):
        for mine, theirs in zip(found[1][place]["values"], every_value, strict=True):
            assert mine == pytest.approx(theirs, abs=1e-4)
        got = found[-1][place]["head"]
        assert float((got - weight.grad).abs().max()) < TOLERANCE * float(weight.grad.abs().max())
        assert found[0][place]["metrics"]["value_loss"] == pytest.approx(critic_loss.item(), rel=1e-4)


@pytest.mark.parametrize("name", ["dr_grpo", "ppo"])
def test_kl_in_the_reward_is_that_of_the_sampling_policy(name: str, folder: Path, tmp_path: Path) -> None:
    coefficient = 0.4
    options = {"kl_coef": coefficient, "kl_in": "reward", "kl_form": "k1"}
    sizes = {"gae_gamma": GAMMA, "gae_lambda": LAMBDA} if name == "ppo" else {"length": max(RESPONSES)}
    found = run_ranks(learn, 2, tmp_path, folder, name, options | sizes, 1)
    model, reference = load_llama(folder), load_llama(folder)
    nudge({id(p): p for p in reference.parameters()}.values())
    weight = head()
    loss = torch.zeros(())
    penalties, logps = [], []
    for trajectory in trajectories():
        logps.append(reference_logp(model, trajectory))
        with torch.no_grad():
            penalties.append(coefficient * (logps[-1] - reference_logp(reference, trajectory)))
    rewards = torch.tensor(
        [t.reward - float(p.sum()) for t, p in zip(trajectories(), penalties, strict=True)]
    )
    for index, trajectory in enumerate(trajectories()):
        if name == "dr_grpo":
            advantage = rewards[index] - rewards.view(-1, 2)[index // 2].mean()
            loss = loss - (advantage * logps[index]).sum() / max(RESPONSES) / len(RESPONSES)
        else:
            sequence = torch.tensor([trajectory.prompt_tokens + trajectory.response_tokens])
            with torch.no_grad():
                values = (model.model(sequence).last_hidden_state[0] @ weight.t())[:-1, 0]
            values = values[len(trajectory.prompt_tokens) - 1 :]
            token_advantage = brute_force_gae(values.tolist(), trajectory.reward, penalties[index].tolist())
            loss = loss - (token_advantage * logps[index]).sum() / sum(RESPONSES)
    assert_gradients(found, gradients_of(model, loss))


def brute_force_gae(values: list[float], reward: float, penalties: list[float] | None = None) -> Tensor:
    """The sum over all later errors, term by term."""
    last = len(values) - 1
    costs = penalties or [0.0] * len(values)
    errors = [
        (reward if t == last else GAMMA * values[t + 1]) - values[t] - costs[t] for t in range(len(values))
    ]
    return torch.tensor(
        [sum((GAMMA * LAMBDA) ** (k - t) * errors[k] for k in range(t, last + 1)) for t in range(last + 1)]
    )


def test_old_log_probs_stay_those_of_before_the_first_update(folder: Path, tmp_path: Path) -> None:
    found = run_ranks(learn, 2, tmp_path, folder, "grpo", {}, 2)
    model = load_llama(folder)
    with torch.no_grad():
        expected = [reference_logp(model, trajectory).tolist() for trajectory in trajectories()]
    for place in range(len(LAYOUTS)):
        for mine, theirs in zip(found[1][place]["old"], expected, strict=True):
            assert mine == pytest.approx(theirs, abs=1e-4)
        # the second update meets a policy that the first has moved
        ratio = found[0][place]["metrics"]["objective/ratio_max"]
        assert ratio != pytest.approx(1.0, abs=1e-3)


def test_rewards_are_normalised_over_the_step_though_each_update_has_equal_ones(
    folder: Path, tmp_path: Path
) -> None:
    rewards = [1.0] * 4 + [0.0] * 4  # the first update's four responses, and the second's
    found = run_ranks(learn, 2, tmp_path, folder, "reinforce_pp", {}, 2, rewards)
    advantage = 0.5 / torch.tensor(rewards).std().item()
    share = (sum(RESPONSES[:4]) - sum(RESPONSES[4:])) / sum(RESPONSES)
    for place in range(len(LAYOUTS)):
        metrics = found[0][place]["metrics"]
        assert metrics["objective/advantage_mean"] == pytest.approx(advantage * share, abs=1e-4)
        assert metrics["tokens_trained"] == sum(map(sum, LENGTHS)) + sum(prompt for prompt, *_ in LENGTHS)
