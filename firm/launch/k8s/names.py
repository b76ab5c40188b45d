"""Names that an installation has on a cluster: objects of the charts, labels, and names that the operators define."""

from __future__ import annotations

from firm import __version__

PROJECT = "firm"
IMAGE = f"firm/runtime:{__version__}"
GPU = "nvidia.com/gpu"
GPU_TOLERATION = {"key": GPU, "operator": "Exists", "effect": "NoSchedule"}
"""The taint that keeps other pods off nodes with GPUs."""

# Objects that the chart `firm` makes or refers to; what may have another name stands in its ConfigMap, by the key here.
CONFIG_MAP = "firm"
SERVICE_ACCOUNT = "firm-training"
STORE_SECRET = "object-store"
STORE_SECRET_KEY = "FIRM_STORE_SECRET"
STORE_KEYS = {"accesskey": "AWS_ACCESS_KEY_ID", "secretkey": "AWS_SECRET_ACCESS_KEY"}
"""Key of the Secret -> environment variable."""
ENDPOINTS_SECRET = "firm-endpoints"
ENDPOINTS_SECRET_KEY = "FIRM_ENDPOINTS_SECRET"
ENDPOINTS_KEYS = {"api-key": "OPENAI_API_KEY", "hf-token": "HF_TOKEN"}
"""The same; the Secret may be absent."""
MODELS = "/models"
"""Where the model cache is mounted."""
CA_SECRET_KEY = "FIRM_CA_SECRET"
"""Secret with the file of trusted authorities; where its key is mounted says `firm.certificates.CA_BUNDLE`."""

# Labels and annotations.
PART_OF = "app.kubernetes.io/part-of"
RUN = "firm/run"
STAGE = "firm/stage"
KFP_RUN = "firm/kfp-run"
SPEC = "firm/spec"  # annotation: hash of the job's specification
RUN_ID = "pipeline/runid"  # Kubeflow Pipelines' label of all pods and workflows of a run
STEP_CONTAINER = "main"  # Argo's

# The Training Operator's.
GROUP = "kubeflow.org"
VERSION = "v1"
PLURAL = "pytorchjobs"
CONTAINER = "pytorch"
JOB_NAME = "training.kubeflow.org/job-name"
