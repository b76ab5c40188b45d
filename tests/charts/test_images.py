"""Every image of the values: a digest wins over the tag wherever the image is used, and a mirror over its registry."""

import re
from pathlib import Path

import pytest
import yaml

CHARTS = Path(__file__).parents[2] / "charts"
DIGEST = "sha256:" + "0123456789abcdef" * 4
CRITIC = {"critic": {"enabled": True, "model": "s3://firm/runs/first/critic"}}
VLLM = {"critic": {**CRITIC["critic"], "engine": "vllm"}}


def images(values, path=()):
    """Path of each image in a chart's values."""
    for key, value in values.items():
        if isinstance(value, dict) and "digest" in value:
            yield (*path, key)
        elif isinstance(value, dict):
            yield from images(value, (*path, key))


IMAGES = [
    (chart, path)
    for chart in ("firm", "platform")
    for path in images(yaml.safe_load((CHARTS / chart / "values.yaml").read_text()))
]


def test_all_images_can_be_pinned_in_one_spelling():
    assert len(IMAGES) >= 17
    for chart, path in IMAGES:
        image = yaml.safe_load((CHARTS / chart / "values.yaml").read_text())
        for key in path:
            image = image[key]
        assert set(image) - {"pullPolicy"} == {"registry", "repository", "tag", "digest"}, path


@pytest.mark.parametrize(
    ("chart_name", "path"), IMAGES, ids=[".".join((chart_name, *path)) for chart_name, path in IMAGES]
)
def test_a_digest_wins_over_the_tag_everywhere(render, chart_name, path):
    values = {"repository": "mine/image", "tag": "v9", "digest": DIGEST}
    for key in reversed(path):
        values = {key: values}
    if chart_name == "firm":
        critic = (VLLM if path[-1] == "vllmImage" else CRITIC)["critic"]
        values = {**values, "critic": {**critic, **values.get("critic", {})}}
    result = render(chart_name, values=values)
    assert not result.error, result.error
    found = re.findall(r"mine/image\S*", yaml.safe_dump(result.objects, width=10**6))
    assert found and all(re.match(rf"mine/image(@{DIGEST})?(?![:@\w])", image) for image in found), found
    assert any(DIGEST in image for image in found)


@pytest.mark.parametrize("registry", ["mirror.example.com/team", "mirror.example.com/team/"])
@pytest.mark.parametrize(("chart_name", "values"), [("platform", {}), ("firm", CRITIC), ("firm", VLLM)])
def test_a_mirror_has_every_image(render, chart_name, values, registry):
    mirrored = render(chart_name, values={**values, "imageRegistry": registry})
    own = render(chart_name, values=values or None)
    names = {c["image"].removeprefix("mirror.example.com/team/") for pod in mirrored.pods for c in pod.containers}
    assert not [name for name in names if "mirror" in name]
    originals = {c["image"] for pod in own.pods for c in pod.containers}
    assert len(names) == len(originals) and all(any(image.endswith(name) for image in originals) for name in names)
    text = yaml.safe_dump(mirrored.objects)
    assert not re.search(r"\b(docker\.io|quay\.io|ghcr\.io|gcr\.io)/", text), "arguments and settings name images too"


def test_registries_can_differ(render):
    """FIRM's images from one place and vLLM's from its own: by image, with no mirror for all."""
    values = {**VLLM, "image": {"runtime": {"registry": "r.io/a"}, "slim": {"registry": "r.io/b/"}}}
    result = render("firm", values=values)
    assert result.get("ConfigMap/firm")["data"]["FIRM_IMAGE"].startswith("r.io/a/firm/runtime:")
    (pod,) = (pod for pod in result.pods if pod.owner == "Deployment/critic")
    fetch, server = pod.containers
    assert fetch["image"].startswith("r.io/b/firm/slim:") and server["image"].startswith("docker.io/vllm/")


def test_readmes_say_how_to_find_a_digest(chart):
    assert "docker buildx imagetools inspect" in (chart / "README.md").read_text()
