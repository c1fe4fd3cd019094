"""Data of one's own on the command line: files and folders that are read, or named errors."""

import json

import keras
import numpy as np
import pytest
from command_line import call

from tf_lyapunov.cli import BAD_INPUT, DONE
from tf_lyapunov.data import arrays

RNG = np.random.default_rng(0)
X = RNG.standard_normal((60, 4)).astype("float32")
Y = (X[:, 0] > 0).astype(int) + (X[:, 1] > 0)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    keras.utils.set_random_seed(0)
    path = tmp_path_factory.mktemp("model") / "model.keras"
    layers = [keras.layers.Dense(5, "relu"), keras.layers.Dense(3)]
    keras.Sequential([keras.Input((4,)), *layers]).save(path)
    return path


@pytest.fixture
def npz(tmp_path):
    path = tmp_path / "numbers.npz"
    np.savez(path, x=X, y=Y)
    return path


def written(path, header, rows):
    path.write_text("\n".join([header, *(",".join(map(str, row)) for row in rows)]) + "\n")
    return path


@pytest.fixture
def table(tmp_path):
    rows = [[*x, "abc"[y]] for x, y in zip(X, Y, strict=True)]
    return written(tmp_path / "table.csv", "p,q,r,s,label", rows)


def folder_of_images(folder, sizes=((4, 4),), classes=("cat", "dog"), each=6, mode="L"):
    image = pytest.importorskip("PIL.Image")
    for number, name in enumerate(classes):
        (folder / name).mkdir(parents=True)
        for i in range(each):
            size = (*sizes[i % len(sizes)], *((3,) if mode == "RGB" else ()))
            pixels = RNG.integers(0, 256, size, dtype=np.uint8) // 2 + 100 * number
            image.fromarray(pixels.astype(np.uint8)).save(folder / name / f"{i}.png")
    return folder


# What works -------------------------------------------------------------------------------------


def test_a_model_is_certified_on_a_file_of_arrays_all_of_it(model, npz, capsys):
    code, out, err = call(capsys, "certify", model, "--data", npz, "--json")
    assert code == DONE and json.loads(out)["examples"] == 60
    assert "60 test examples of shape (4,), 3 classes" in err and "All of it is test data" in err


@pytest.mark.parametrize(
    "command", [("attack", "--steps", 2, "--radius", 0.1), ("bracket", "--samples", 3)]
)
def test_attacks_and_brackets_take_the_same_files(model, table, capsys, command):
    name, *options = command
    code, out, err = call(capsys, name, model, "--data", table, *options, "--json")
    assert code == DONE and json.loads(out)
    assert "Classes by name: 0 a, 1 b, 2 c" in err


def test_an_evaluation_takes_a_table_with_another_label_column(model, tmp_path, capsys):
    rows = [[y, *x] for x, y in zip(X, Y, strict=True)]
    path = written(tmp_path / "t.csv", "species,p,q,r,s", rows)
    command = ("evaluate", model, "--data", path, "--label", "species", "--radius", 0.1)
    code, out, _ = call(capsys, *command, "--samples", 8, "--json")
    assert code == DONE and json.loads(out)["rows"]


def test_training_on_a_table_certifies_the_test_part_of_the_same_split(table, tmp_path, capsys):
    config = tmp_path / "own.yaml"
    config.write_text(
        f"dataset: {{name: {table}}}\nmodel: {{name: mlp, widths: [6]}}\n"
        "training: {epochs: 1, batch_size: 16}\nclaim: {gain: 2.0}\n"
    )
    code, _, _ = call(capsys, "train", config, "--run-dir", tmp_path / "run")
    assert code == DONE
    code, out, _ = call(capsys, "certify", tmp_path / "run", "--json")
    assert code == DONE and json.loads(out)["examples"] == 12  # a fifth
    code, _, err = call(capsys, "certify", tmp_path / "run", "--label", "label")
    assert code == BAD_INPUT and "A run knows its data. Received: label='label'" in err


def test_a_folder_of_images_by_class_is_read_in_a_fixed_mixed_order(tmp_path):
    folder = folder_of_images(tmp_path / "pets", each=20)
    data = arrays.load(str(folder))
    assert data.x_train.shape == (28, 4, 4, 1) and data.class_names == ("cat", "dog")
    assert (len(data.x_val), len(data.x_test), data.num_classes) == (4, 8, 2)
    assert data.preprocessing == "x/255 - 0.5" and data.pixel_range == (-0.5, 0.5)
    assert set(data.y_test.tolist()) == {0, 1}
    np.testing.assert_array_equal(data.x_test, arrays.load(str(folder)).x_test)
    parts = [data.x_train, data.x_val, data.x_test]
    every = np.concatenate(parts).reshape(40, -1)
    assert len(np.unique(every, axis=0)) == 40  # no image in two parts


def test_a_folder_with_parts_keeps_them_and_holds_validation_out_of_training(tmp_path):
    for part, each in (("train", 10), ("test", 3)):
        folder_of_images(tmp_path / "pets" / part, each=each, mode="RGB")
    data = arrays.load(str(tmp_path / "pets"), pixels="unit")
    assert [len(data.split(p)[0]) for p in ("train", "val", "test")] == [18, 2, 6]
    assert data.x_test.shape[1:] == (4, 4, 3) and 0 <= data.x_test.min() <= data.x_test.max() <= 1


def test_arrays_with_parts_keep_them_and_bytes_become_images(tmp_path):
    images = RNG.integers(0, 256, (30, 5, 5), dtype=np.uint8)
    labels = np.tile([-1, 1], 15)
    path = tmp_path / "parts.npz"
    np.savez(path, x_train=images, y_train=labels, x_test=images[:4], y_test=labels[:4])
    data = arrays.load(str(path), validation=5)
    assert data.x_train.shape == (25, 5, 5, 1) and data.y_test.tolist() == [0, 1, 0, 1]
    np.testing.assert_allclose(data.x_test[..., 0], images[:4] / 255 - 0.5, atol=1e-6)


def test_choices_are_made_on_validation_data_where_a_file_has_no_test_part(tmp_path):
    path = tmp_path / "parts.npz"
    np.savez(path, x_train=X, y_train=Y, x_val=X[:7] + 1, y_val=Y[:7])
    data = arrays.load(str(path))
    np.testing.assert_array_equal(data.x_test, X[:7] + 1)
    assert len(data.x_val) == 6 and len(data.x_train) == 54


def test_a_column_named_split_says_the_parts(tmp_path):
    parts = ["train"] * 3 + ["val", "test", "test"]
    rows = [[*x, y, p] for x, y, p in zip(X[:6], Y[:6], parts, strict=True)]
    path = written(tmp_path / "s.csv", "a,b,c,d,y,split", rows)
    data = arrays.load(str(path))
    assert [len(data.split(p)[0]) for p in ("train", "val", "test")] == [3, 1, 2]


def test_any_builder_in_the_data_directory_is_read(tmp_path, capsys):
    """Also one's own: `flowers/1.0.0` as TensorFlow Datasets writes it."""
    tfds = pytest.importorskip("tensorflow_datasets")
    tensorflow = pytest.importorskip("tensorflow")
    features = tfds.features.FeaturesDict(
        {
            "image": tfds.features.Image(shape=(None, None, 1)),
            "kind": tfds.features.Scalar(np.int64),
        }
    )

    def examples(count, side=4):
        shape = (count, side, side, 1)
        images = RNG.integers(0, 256, shape, dtype=np.uint8)
        return tensorflow.data.Dataset.from_tensor_slices(
            {"image": images, "kind": np.arange(count, dtype="int64") % 2}
        )

    for name, test in (("flowers", examples(5)), ("sizes", examples(5, side=3))):
        tfds.dataset_builders.store_as_tfds_dataset(
            name=name,
            version="1.0.0",
            features=features,
            split_datasets={"train": examples(20), "test": test},
            data_dir=tmp_path,
        )
    data = arrays.load("flowers", tmp_path, label="kind")
    assert [len(data.split(p)[0]) for p in ("train", "val", "test")] == [18, 2, 5]
    with pytest.raises(ValueError, match=r"`--label` names .*Received: flowers with image, kind"):
        arrays.load("flowers", tmp_path)
    with pytest.raises(ValueError, match=r"one shape. Received: sizes with .*\(3, 3, 1\)"):
        arrays.load("sizes", tmp_path, label="kind")


# What does not, by name --------------------------------------------------------------------------


def refused(capsys, *arguments):
    code, out, err = call(capsys, *arguments)
    assert code == BAD_INPUT and not out and "Received:" in err
    return err


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a,b,c,d,label\n1,2,3,4,0\n1,2,3,0\n", "as the header, 5. Received: t.csv, line 3 with 4"),
        ("a,b,c,d,e\n1,2,3,4,0\n", "columns a, b, c, d, e"),
        ("a,b,c,d,label\n1,2,x,4,0\n", "'x' in t.csv, line 2, column 'c'"),
        ("a,b,c,d,label\n1,2,nan,4,0\n", "'nan' in t.csv, line 2, column 'c'"),
        ("a,b,c,d,label\n1,2,3,4,\n", "line 2 without one"),
        ("1,2,3,4,0\n1,2,3,4,1\n", "must name its columns"),
        ("", "must hold a header"),
        ("a,b,c,d,label\n", "t.csv without any"),
        ("a,b,c,d,label\n1,2,3,4,0.5\n", "such as [0.5]"),
        ("a,b,c,d,label\n1,2,3,4,-3\n", "labels from -3.0 to -3.0"),
        ("a,b,c,d,label\n1,2,3,4,7\n", "labels from 7 to 7 from 't.csv'"),
        ("a,b,label\n1,2,0\n", "inputs of shape (2,) from 't.csv' for a model of input shape (4,)"),
        ("a,b,c,d,label\n1,2,3,4,x\n1,2,3,5,y\n", "must occur. Received: x, y"),
        ("a,b,c,d,label,split\n1,2,3,4,0,new\n", "'new' in t.csv, line 2"),
    ],
)
def test_a_wrong_table_is_refused_with_the_line_that_is_wrong(
    model, tmp_path, capsys, text, message
):
    path = tmp_path / "t.csv"
    path.write_text(text)
    assert message in refused(capsys, "certify", model, "--data", path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"x": X}, "numbers.npz with x"),
        ({"x": X, "y": Y[:-1]}, "shapes (60, 4) and (59,)"),
        ({"x_train": X, "x_test": X, "y_test": Y}, "x_train and without y_train"),
        ({"x": np.array([[1, None]]), "y": Y[:1]}, "an array that does not"),
        ({"x": np.where(X > 2, np.nan, X), "y": Y}, "NaN or infinity in numbers.npz"),
        ({"x": (X * 9).astype(np.uint8), "y": Y}, "bytes in numbers.npz, and no `--pixels`"),
        ({"x": X + 0j, "y": Y}, "dtype complex64"),
    ],
)
def test_wrong_arrays_are_refused_by_name(model, tmp_path, capsys, content, message):
    path = tmp_path / "numbers.npz"
    np.savez(path, **content)
    assert message in refused(capsys, "certify", model, "--data", path)


def test_damaged_and_missing_files_are_refused(model, npz, tmp_path, capsys):
    npz.write_bytes(npz.read_bytes()[:-200])
    assert "cannot be read" in refused(capsys, "certify", model, "--data", npz)
    assert "no such data" in refused(capsys, "certify", model, "--data", tmp_path / "no.npz")
    (tmp_path / "t.txt").write_text("1 2 3")
    assert "read from .npz" in refused(capsys, "attack", model, "--data", tmp_path / "t.txt")
    err = refused(capsys, "certify", model, "--data", "mnits", "--data-dir", tmp_path)
    assert "name='mnits'" in err and "mnist" in err
    err = refused(capsys, "certify", model, "--data", "digits", "--pixels", "raw")
    assert "pixels='raw' for 'digits'" in err


def test_images_of_several_sizes_are_refused_with_two_of_them(model, tmp_path, capsys):
    folder = folder_of_images(tmp_path / "pets", sizes=((4, 4), (4, 6)))
    err = refused(capsys, "certify", model, "--data", folder)
    assert "0.png of 4×4 and" in err and "1.png of 6×4 pixels" in err


def test_folders_without_classes_or_images_and_damaged_images_are_refused(model, tmp_path, capsys):
    (tmp_path / "flat").mkdir()
    assert "at least two" in refused(capsys, "certify", model, "--data", tmp_path / "flat")
    folder = folder_of_images(tmp_path / "pets", each=2)
    (folder / "cat" / "0.png").write_bytes(b"no image")
    assert "0.png" in refused(capsys, "certify", model, "--data", folder)
    (folder / "bird").mkdir()
    assert "without any for bird" in refused(capsys, "certify", model, "--data", folder)


def test_too_few_examples_to_split_are_refused_when_training(tmp_path):
    path = written(tmp_path / "t.csv", "a,label", [[1, 0], [2, 1], [3, 0]])
    with pytest.raises(ValueError, match=r"training, validation and test. Received: t.csv"):
        arrays.load(str(path))
    np.savez(tmp_path / "test.npz", x_test=X, y_test=Y)
    with pytest.raises(ValueError, match=r"holds only test"):
        arrays.load(str(tmp_path / "test.npz"))
