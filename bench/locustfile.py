"""Locust's users of an OpenAI-compatible server: `locust -f bench/locustfile.py --host URL`."""

from locust import HttpUser, between, task


class Reader(HttpUser):
    wait_time = between(0.0, 0.05)

    def ask(self, path, body):
        with self.client.post(path, json=body, stream=True, catch_response=True) as got:
            if got.status_code != 200:
                got.failure(f"status {got.status_code}")
                return
            content = got.content
            streamed = body.get("stream")
            if streamed and not content.endswith(b"data: [DONE]\n\n"):
                got.failure("the stream ended early")

    @task(3)
    def stream(self):
        self.ask(
            "/v1/completions",
            {"model": "mock", "prompt": "once upon a time", "max_tokens": 16, "stream": True},
        )

    @task(1)
    def chat(self):
        messages = [{"role": "user", "content": "hello"}]
        self.ask("/v1/chat/completions", {"model": "mock", "messages": messages, "max_tokens": 8})
