import base64
import dataclasses
import json

import pytest
from starlette.testclient import TestClient

from runtime.errors import BackendError
from runtime.serving.http_api import build_app
from runtime.serving.service import run_isolated


def close(answers, expected):
    for answer, wanted in zip(answers, expected, strict=True):
        assert answer.pop("image") is not None
        assert answer.keys() == wanted.keys()
        assert [a["label"] for a in answer["alternatives"]] == [a["label"] for a in wanted["alternatives"]]
        assert answer["task"] == wanted["task"]
        assert answer["score"] == pytest.approx(wanted["score"], abs=1e-6)
        assert answer["gates"] == pytest.approx(wanted["gates"], abs=1e-6)
        assert (answer["residuals"] is None) == (wanted["residuals"] is None)
        assert answer["unknown"] == pytest.approx(wanted["unknown"], abs=1e-6)
        assert answer["is_unknown"] == wanted["is_unknown"]
        assert answer["route_margin"] == pytest.approx(wanted["route_margin"], abs=1e-5)
        assert answer["route_confidence"] == pytest.approx(wanted["route_confidence"], abs=1e-5)
    return True


def test_raw_bytes_are_answered_as_the_classifier_answers(client, png, direct):
    response = client.post("/v1/classify", content=png(), headers={"content-type": "image/png"})
    assert response.status_code == 200
    assert close(response.json(), direct([png()]))


def test_a_multipart_request_may_hold_several_images_tasks_and_top_k(client, png, direct):
    files = [("image", (f"{seed}.png", png(seed))) for seed in range(5)]  # more than a batch
    response = client.post("/v1/classify", files=files, data={"tasks": "birds,cars", "top_k": "2"})
    answers = response.json()
    assert [answer["image"] for answer in answers] == [f"{seed}.png" for seed in range(5)]
    assert close(answers, direct([png(seed) for seed in range(5)], ["cars", "birds"], 2))


def test_json_takes_base64_and_data_values(client, png, direct):
    text = base64.b64encode(png()).decode()
    body = {"images": [text, f"data:image/png;base64,{text}"], "tasks": ["digits"], "top_k": 1}
    answers = client.post("/v1/classify", json=body).json()
    assert close(answers, direct([png()] * 2, ["digits"], 1))


@pytest.mark.parametrize(
    "image",
    ["http://example.com/a.png", "HTTPS://x", "file:///etc/passwd", {"url": "x"}, "//host/x", "s3://b/k"],
)
def test_links_are_refused(client, image):
    response = client.post("/v1/classify", json={"images": [image]})
    assert response.status_code == 400
    assert "not followed" in response.json()["detail"]


@pytest.mark.parametrize(
    ("body", "status", "told"),
    [
        ({"images": []}, 400, "none given"),
        ({"images": ["%%%"]}, 400, "base64"),
        ({"images": [3]}, 400, "got int"),
        ({"images": "x"}, 400, "list"),
        ([1], 400, "object"),
        ({"images": ["eA=="], "image_url": "x"}, 400, "unknown keys"),
        ({"images": ["eA=="], "tasks": 3}, 400, "list of names"),
        ({"images": ["eA=="], "tasks": ["nope"]}, 422, "unknown nope"),
        ({"images": ["eA=="], "top_k": 0}, 400, "top_k"),
        ({"images": ["eA=="], "top_k": True}, 400, "top_k"),
        ({"images": ["eA=="], "top_k": 1.5}, 400, "top_k"),
        ({"images": ["eA=="]}, 422, "not an image"),
        ({"images": [""]}, 422, "no bytes"),
        ({"images": ["eA=="] * 7}, 413, "at most 6"),
    ],
)
def test_what_is_wrong_with_a_request_is_told_as_a_problem(client, body, status, told):
    response = client.post("/v1/classify", json=body)
    assert response.status_code == status
    assert response.headers["content-type"] == "application/problem+json"
    assert told in response.json()["detail"]
    assert response.json()["status"] == status


def test_every_unreadable_image_of_a_request_is_named(client, png):
    files = [("image", (name, content)) for name, content in (("a", png()), ("b", b"x"), ("c", png()[:60]))]
    detail = client.post("/v1/classify", files=files).json()["detail"]
    assert "image b" in detail
    assert "image c" in detail
    assert "image a" not in detail


def test_large_images_are_refused_before_they_are_decoded(client, png):
    response = client.post("/v1/classify", content=png(size=(101, 100)))
    assert response.status_code == 422
    assert "101 x 100 pixels" in response.json()["detail"]


def test_postscript_is_no_image(client):
    response = client.post("/v1/classify", content=b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")
    assert response.status_code == 422


def test_a_url_encoded_form_is_no_image(client):
    response = client.post("/v1/classify", data={"a": "b"})
    assert response.status_code == 415


def test_a_failing_model_fails_only_the_request_that_made_it_fail(engine, png):
    good = engine.work([("0", png())], None, 5, 10_000)
    bad = engine.work([("0", png(1))], None, 5, 10_000)

    class Fragile:
        def run(self, batch):
            if bad in batch:
                raise BackendError("broken")
            return engine.run(batch)

    first, second, third = run_isolated(Fragile(), [good, bad, good])
    assert isinstance(second, BackendError)
    assert first[0].label == third[0].label == engine.run([good])[0][0].label


def test_requests_for_different_tasks_share_a_batch(engine, png):
    works = [
        engine.work([("0", png(seed)), ("1", png(seed + 10))], tasks, 1 + seed, 10_000)
        for seed, tasks in enumerate([None, ["cars"], ["birds", "flowers"], None, ["cars"]])
    ]
    for work, found in zip(works, engine.run(works), strict=True):
        (alone,) = engine.run([work])
        for ours, theirs in zip(found, alone, strict=True):
            assert (ours.task, ours.label) == (theirs.task, theirs.label)
            assert ours.score == pytest.approx(theirs.score, abs=1e-6)
            assert len(ours.alternatives) == len(theirs.alternatives)


def test_health_model_and_metrics(client, png):
    assert client.get("/healthz").json() == {"status": "ok"}
    assert client.get("/readyz").json()["status"] == "ready"
    assert set(client.get("/v1/model").json()["tasks"]) == {"cars", "birds", "digits", "flowers"}
    client.post("/v1/classify?tasks=cars", content=png())
    client.post("/v1/classify", content=png())
    client.post("/v1/classify", content=b"no image")
    text = client.get("/metrics").text
    assert 'mass_requests_total{node="here",route="/v1/classify",status="200"} 2.0' in text
    assert 'mass_requests_total{node="here",route="/v1/classify",status="422"} 1.0' in text
    assert 'mass_asked_images_total{node="here",task="cars"} 1.0' in text
    assert 'mass_asked_images_total{node="here",task="any"} 1.0' in text
    assert 'mass_route_margin_count{node="here"} 1.0' in text
    assert "mass_request_seconds_bucket" in text


def test_unknown_images_are_counted_by_the_bundles_verdict_not_by_the_margin(client, png, direct):
    contents = [png(seed) for seed in range(12)]
    verdicts = [found["is_unknown"] for found in direct(contents)]
    assert set(verdicts) == {True, False}
    answers = [client.post("/v1/classify", content=content).json()[0] for content in contents]
    assert [answer["is_unknown"] for answer in answers] == verdicts
    client.post("/v1/classify?tasks=cars", content=contents[0])  # no first pass, no verdict
    text = client.get("/metrics").text
    assert f'mass_unknown_images_total{{node="here"}} {float(sum(verdicts))}' in text
    assert 'mass_judged_images_total{node="here"} 12.0' in text
    assert 'mass_unknown_score_count{node="here"} 12.0' in text
    assert 'mass_route_margin_count{node="here"} 12.0' in text
    assert 'mass_route_confidence_count{node="here"} 12.0' in text


def test_without_a_threshold_there_is_a_score_but_no_verdict(service, png):
    service.engine.classifier.router = dataclasses.replace(
        service.engine.classifier.router, unknown_threshold=None
    )
    try:
        client = TestClient(build_app(service))
        (answer,) = client.post("/v1/classify", content=png()).json()
        text = client.get("/metrics").text
    finally:
        service.engine.classifier.router = service.engine.classifier.manifest.router
    assert answer["unknown"] > 0
    assert answer["is_unknown"] is None
    assert 'mass_judged_images_total{node="here"}' not in text
    assert 'mass_unknown_score_count{node="here"} 1.0' in text


def test_unknown_paths_make_no_new_series(client):
    for path in ("/a", "/b"):
        assert client.get(path).status_code == 404
    text = client.get("/metrics").text
    assert 'route="other",status="404"} 2.0' in text


def test_the_description_names_the_three_forms_of_a_request(client):
    schema = client.get("/openapi.json").json()
    content = schema["paths"]["/v1/classify"]["post"]["requestBody"]["content"]
    assert set(content) == {"image/*", "multipart/form-data", "application/json"}
    json.dumps(schema)


def test_without_the_key_only_health_and_page_are_open(service, png, monkeypatch):
    monkeypatch.setenv("MASS_API_KEY", "secret")
    client = TestClient(build_app(service))
    assert client.get("/healthz").status_code == client.get("/").status_code == 200
    for path in ("/metrics", "/v1/model", "/openapi.json"):
        assert client.get(path).status_code == 401
    refused = client.post("/v1/classify", content=png(), headers={"authorization": "Bearer wrong"})
    assert refused.status_code == 401
    assert refused.headers["www-authenticate"] == "Bearer"
    for headers in ({"authorization": "Bearer secret"}, {"x-api-key": "secret"}):
        assert client.post("/v1/classify", content=png(), headers=headers).status_code == 200


def test_the_page_allows_only_its_own_script(client):
    response = client.get("/")
    policy = response.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    assert "//" not in response.text.replace("// Shares", "")  # nothing from elsewhere
