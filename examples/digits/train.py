"""Trains a small neural network on scikit-learn's bundled handwritten digits (1,797 pictures of 8x8 pixels).

In Nabla:      nabla run -- python train.py
By itself:     python train.py          (nothing is tracked then; files go to ./output)
"""

import os
import time
from pathlib import Path

# Such small matrices are multiplied faster by one thread; this must be said before numpy is imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import joblib
import numpy as np
from sklearn.datasets import load_digits
from sklearn.metrics import classification_report, confusion_matrix, log_loss
from sklearn.neural_network import MLPClassifier

EPOCHS = 50
HELD_OUT = 360  # the last ones, which other people wrote than the first
IN_A_JOB = "NABLA_JOB_ID" in os.environ
if IN_A_JOB:
    import nabla


def main() -> None:
    began = time.monotonic()
    output = Path(os.environ.get("NABLA_ARTIFACTS", "output"))
    output.mkdir(parents=True, exist_ok=True)
    pictures, labels = load_digits(return_X_y=True)
    train, train_labels = pictures[:-HELD_OUT], labels[:-HELD_OUT]
    test, test_labels = pictures[-HELD_OUT:], labels[-HELD_OUT:]
    print(f"{len(train)} digits to learn from, {len(test)} to test with", flush=True)

    model = fit(train, train_labels, test, test_labels)

    accuracy = float(model.score(test, test_labels))
    track({"test_accuracy": accuracy}, step=EPOCHS)
    (output / "report.txt").write_text(report(test_labels, model.predict(test)))
    joblib.dump(model, output / "model.joblib")
    print(f"test accuracy {accuracy:.1%} after {time.monotonic() - began:.1f} s; see report.txt", flush=True)
    if IN_A_JOB:
        version = nabla.save_model(
            output / "model.joblib", name="digits", framework="sklearn", metrics={"test_accuracy": accuracy}
        )
        print(f"registered as digits:{version.version}", flush=True)


def fit(train, train_labels, test, test_labels):
    """One pass a time over the pictures, half of them moved by up to a pixel: the place does not count."""
    random = np.random.default_rng(0)
    model = MLPClassifier((256, 128), batch_size=32, learning_rate_init=3e-4, alpha=1e-3, random_state=0)
    for epoch in range(1, EPOCHS + 1):
        model.partial_fit(shifted(train, random), train_labels, classes=range(10))
        loss = log_loss(train_labels, model.predict_proba(train))
        accuracy = model.score(test, test_labels)
        track({"loss": loss, "accuracy": accuracy}, step=epoch)
        if epoch % 5 == 0:
            print(f"epoch {epoch:2}/{EPOCHS}  loss {loss:.4f}  accuracy {accuracy:.3f}", flush=True)
    return model


def shifted(pictures, random):
    squares = np.pad(pictures.reshape(-1, 8, 8), ((0, 0), (1, 1), (1, 1)))
    rows, columns = np.where(random.random(len(squares)) < 0.5, random.integers(0, 3, (2, len(squares))), 1)
    moved = [s[r : r + 8, c : c + 8] for s, r, c in zip(squares, rows, columns, strict=True)]
    return np.stack(moved).reshape(-1, 64)


def report(truth, predicted) -> str:
    table = "\n".join(" ".join(f"{count:4}" for count in row) for row in confusion_matrix(truth, predicted))
    return f"{classification_report(truth, predicted, digits=3)}\nrows: truth, columns: prediction\n{table}\n"


def track(metrics: dict, step: int) -> None:
    if IN_A_JOB:
        nabla.log(metrics, step=step)


if __name__ == "__main__":
    main()
