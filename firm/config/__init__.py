"""The configuration of a run: one file per section, `run` with all of them, `loading` for presets and files.

Which sections there are says which stages run: `stages`. Unknown keys and impossible values are rejected. Each section
is passed only to the code that it configures.
Nothing here loads torch.
"""

from firm.config.auditor import AuditorConfig
from firm.config.bench import METRICS, BenchConfig, Gate, PolicySource, Rule, ScoresSource
from firm.config.chat import ChatConfig, EndpointChat, PythonChat
from firm.config.critic import CriticConfig
from firm.config.curation import (
    CandidateSource,
    CurationConfig,
    FilesSource,
    FunctionSource,
    GeneratedSource,
    JudgedDimension,
)
from firm.config.evaluate import EvaluateConfig
from firm.config.launch import LaunchConfig, LocalLaunch, PyTorchJobLaunch
from firm.config.lora import LoraConfig
from firm.config.policy import PolicyConfig
from firm.config.prompts import PromptsConfig
from firm.config.reward import RewardConfig
from firm.config.rl import RLConfig
from firm.config.run import STAGES, RunConfig, StageName, fingerprint
from firm.config.sft import SFTConfig
from firm.config.stages import CuratedRun, MeasuredRun, SteeredRun, TaughtRun, for_stage, stages_of

__all__ = [
    "METRICS",
    "STAGES",
    "AuditorConfig",
    "BenchConfig",
    "CandidateSource",
    "ChatConfig",
    "CriticConfig",
    "CuratedRun",
    "CurationConfig",
    "EndpointChat",
    "EvaluateConfig",
    "FilesSource",
    "FunctionSource",
    "Gate",
    "GeneratedSource",
    "JudgedDimension",
    "LaunchConfig",
    "LocalLaunch",
    "LoraConfig",
    "MeasuredRun",
    "PolicyConfig",
    "PolicySource",
    "PromptsConfig",
    "PyTorchJobLaunch",
    "PythonChat",
    "RLConfig",
    "RewardConfig",
    "Rule",
    "RunConfig",
    "SFTConfig",
    "ScoresSource",
    "StageName",
    "SteeredRun",
    "TaughtRun",
    "fingerprint",
    "for_stage",
    "stages_of",
]
