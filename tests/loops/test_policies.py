"""What draws from a policy and scores its draws under references: what it asks of them, and how often."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fakes import saved_llama
from polyref.data.prompt_rows import PromptRow
from polyref.errors import ConfigError
from polyref.loops import policies
from polyref.loops.agents import Agent, check_agent
from polyref.loops.policies import Policy, from_policy
from polyref.references.reference_set import Reference, ReferenceSet
from polyref.samplers.engine import SamplingParameters
from polyref.scoring.models import ModelSource


def test_the_vocabulary_of_a_reference_is_read_once_however_many_completions_it_scores(
    tmp_path: Path, tiny_tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = str(saved_llama(tmp_path / "tiny", tiny_tokenizer))
    asked, fingerprint = list[Any](), policies.tokenizer_fingerprint
    monkeypatch.setattr(policies, "tokenizer_fingerprint", lambda tokenizer: asked.append(tokenizer) or fingerprint(tokenizer))
    references = ReferenceSet((Reference(model, name="plain"), Reference(model, system_prompt="be brief", name="brief")))
    prompts = [PromptRow(({"role": "user", "content": f"question {i}?"},), row=i) for i in range(3)]
    source, parameters = ModelSource(model), SamplingParameters(4)
    draw = from_policy(Policy(source), source, prompts, 2, parameters, batch_size=4, seed=0, scored=references)
    drawn = [*draw(prompts[:2]), *draw(prompts[2:])]
    assert len(asked) == 3, "that of the policy and those of both references"
    for one in drawn:
        for proposal in one.proposals:
            plain, brief = proposal.logps
            assert plain == pytest.approx(proposal.own, abs=1e-4) and brief is not None and brief != plain


def test_a_reference_is_not_called_what_an_agent_is() -> None:
    references = ReferenceSet((Reference("model", name="start"),))
    with pytest.raises(ConfigError, match="enhancer.who is start, which a reference is called too"):
        check_agent(Agent("start", 1, SamplingParameters(4)), references, "enhancer.who")
    check_agent(Agent("policy", 1, SamplingParameters(4)), references, "enhancer.who")
