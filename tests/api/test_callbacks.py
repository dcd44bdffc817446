"""Callbacks against a model that only keeps a counter as its state."""

import math

import pytest

from fastdl.callbacks import Callback, EarlyStopping, LambdaCallback, LearningRateSchedule


class Counter:
    """Stands for a model: its state is the number of epochs trained."""

    def __init__(self):
        self.epochs = 0
        self.stop_training = False
        self.lr = 0.1

    def get_state(self):
        return self.epochs

    def set_state(self, state):
        self.epochs = state

    def train(self, callback, name, values):
        callback.model, self.stop_training = self, False
        callback.on_train_begin()
        for epoch, value in enumerate(values):
            callback.on_epoch_begin(epoch)
            self.epochs += 1
            callback.on_epoch_end(epoch, {"loss": 1.0, name: value})
            if self.stop_training:
                break
        callback.on_train_end()
        return epoch


@pytest.mark.parametrize(
    ("arguments", "values", "stopped", "best"),
    [
        ({"patience": 2}, [3, 2, 1, 1, 1, 0], 4, 2),
        ({"patience": 2}, [3, 2, 1, 0, 0.5], None, 3),  # ran out: still the best epoch
        ({"patience": 0}, [3, 4, 1], 1, 0),
        ({"patience": 1, "min_delta": 0.5}, [3, 2.6, 0], 1, 0),
        ({"patience": 2}, [3, math.nan, math.nan, 1], 2, 0),
        ({"patience": 1, "mode": "max"}, [1, 2, 1], 2, 1),
        ({"patience": 1, "monitor": "val_accuracy"}, [0.5, 0.9, 0.8], 2, 1),
        ({"patience": 1, "monitor": "val_accuracy", "mode": "min"}, [0.5, 0.9, 0.8], 1, 0),
    ],
)
def test_early_stopping(arguments, values, stopped, best):
    stop, model = EarlyStopping(**arguments), Counter()
    model.train(stop, arguments.get("monitor", "val_loss"), values)
    assert stop.stopped_epoch == stopped
    assert stop.best_epoch == best
    assert stop.best == values[best]
    assert model.epochs == best + 1


@pytest.mark.parametrize("patience", [0, 1, 2, 3, 7])
def test_patience_counts_epochs_in_a_row_without_improvement(patience):
    """As in Keras: 1 stops at the first, 3 at the third; 0 stops at the first too."""
    stop = EarlyStopping(patience=patience)
    better_once = [5.0] * patience + [4.0]  # the first sets the mark; one fewer than patience follow it
    Counter().train(stop, "val_loss", [*better_once, *[4.0] * 20])
    assert stop.best_epoch == (patience if patience > 0 else 0)
    assert stop.stopped_epoch == stop.best_epoch + max(patience, 1)


def test_last_weights_are_kept_on_request():
    model = Counter()
    model.train(EarlyStopping(patience=1, restore_best_weights=False), "val_loss", [1, 2, 3])
    assert model.epochs == 2


def test_only_nan_keeps_the_weights():
    model = Counter()
    model.train(EarlyStopping(patience=2), "val_loss", [math.nan] * 5)
    assert model.epochs == 2


def test_early_stopping_starts_afresh():
    stop, model = EarlyStopping(patience=1), Counter()
    assert model.train(stop, "val_loss", [1, 2]) == 1
    assert model.train(stop, "val_loss", [9, 8, 7]) == 2


def test_unknown_monitor_lists_what_there_is():
    with pytest.raises(ValueError, match=r"'val_loss'.* reports loss, accuracy"):
        Counter().train(EarlyStopping(), "accuracy", [1])


@pytest.mark.parametrize("arguments", [{"mode": "up"}, {"patience": -1}, {"min_delta": -0.1}])
def test_bad_arguments(arguments):
    with pytest.raises(ValueError, match=next(iter(arguments))):
        EarlyStopping(**arguments)


def test_what_is_no_function_is_refused():
    for make in (lambda: LearningRateSchedule(0.1), lambda: LambdaCallback(on_epoch_end=3)):
        with pytest.raises(TypeError, match="expected a function, found"):
            make()


def test_schedule():
    model, seen = Counter(), []
    schedule = LearningRateSchedule(lambda epoch: 0.1 / (1 + epoch))
    schedule.on_epoch_end = lambda epoch, logs: seen.append(model.lr)
    model.train(schedule, "x", [0, 0, 0])
    assert seen == [0.1, 0.05, 0.1 / 3]


@pytest.mark.parametrize("lr", [-1.0, math.nan, math.inf])
def test_schedule_refuses(lr):
    with pytest.raises(ValueError, match="epoch 0"):
        Counter().train(LearningRateSchedule(lambda epoch: lr), "x", [0])


def test_lambda_callback():
    seen = []
    callback = LambdaCallback(
        on_train_begin=lambda: seen.append("begin"),
        on_epoch_begin=seen.append,
        on_epoch_end=lambda epoch, logs: seen.append(logs["x"]),
        on_train_end=lambda: seen.append("end"),
    )
    assert isinstance(callback, Callback)
    Counter().train(callback, "x", [5, 6])
    Counter().train(LambdaCallback(), "x", [5])
    assert seen == ["begin", 0, 5, 1, 6, "end"]
