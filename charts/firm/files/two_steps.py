"""``helm test``: two steps that pass an artifact through the object store. Fails unless the run succeeds."""

import os
import sys
import time

from kfp import Client, compiler, dsl
from kfp_server_api import ApiException
from urllib3.exceptions import HTTPError

ENDED = ("SUCCEEDED", "FAILED", "SKIPPED", "CANCELED")
step = dsl.component(base_image=os.environ["FIRM_TEST_IMAGE"], install_kfp_package=False)


@step
def write(text: str, note: dsl.Output[dsl.Artifact]) -> None:  # noqa: D103
    with open(note.path, "w") as file:
        file.write(text)


@step
def read(text: str, note: dsl.Input[dsl.Artifact]) -> None:  # noqa: D103
    with open(note.path) as file:
        found = file.read()
    if found != text:
        raise ValueError(f"the artifact holds {found!r}, not {text!r}")


@dsl.pipeline(name="firm-helm-test")
def two_steps(text: str) -> None:
    """Write an artifact in one step, read it in the next."""
    written = write(text=text)
    for task in (written, read(text=text, note=written.outputs["note"])):
        task.set_cpu_request("50m").set_cpu_limit("500m").set_memory_request("128Mi").set_memory_limit("512Mi")


def wait(client: Client, run_id: str, timeout_s: float) -> str:
    """Return the state in which a run ends, or the one it is in when the time is up."""
    state, end = "UNKNOWN", time.monotonic() + timeout_s
    while state not in ENDED and time.monotonic() < end:
        time.sleep(2)
        try:
            state = client.get_run(run_id).state or state
        except (ApiException, HTTPError) as error:  # the API server or its database may be restarting
            print(f"asking again: {error}")  # noqa: T201 (a log, not a library)
    return state


def main() -> None:
    """Submit the pipeline and wait for its end."""
    package = "/tmp/two_steps.yaml"
    compiler.Compiler().compile(two_steps, package)
    client = Client(host=os.environ["KFP_ENDPOINT"])
    run = client.create_run_from_pipeline_package(
        package,
        arguments={"text": f"written at {time.time()}"},
        run_name="helm test",
        experiment_name="helm test",
        enable_caching=False,
    )
    state = wait(client, run.run_id, float(os.environ["TIMEOUT_SECONDS"]))
    print(f"run {run.run_id} {state}")  # noqa: T201
    if state != "SUCCEEDED":
        sys.exit(f"see its steps: kubectl get pods -l pipeline/runid={run.run_id}")


if __name__ == "__main__":
    main()
