"""The card in an adapter's folder: filled from the record, with nothing of peft's empty form left."""

import yaml
from made_results import make_results

from bhpeft.model_card import model_card, write_model_card
from bhpeft.results import read_metrics
from bhpeft.tasks.card import TaskCard


def head_of(text):
    _, head, body = text.split("---\n", 2)
    return yaml.safe_load(head), body


def test_the_card_says_what_the_record_says(tmp_path):
    make_results(tmp_path)
    folder = tmp_path / "adapters" / "strong"
    TaskCard("classification", ["negative", "positive"], True, "{text_input}", None, 64, "generate").write(folder)
    (folder / "README.md").write_text("# Model Card for Model ID\n[More Information Needed]\n")
    record = read_metrics(tmp_path / "metrics" / "strong.json")
    write_model_card(folder, record, tmp_path / "predictions" / "strong.csv")
    head, body = head_of((folder / "README.md").read_text(encoding="utf-8"))
    assert head == {
        "base_model": "org/tiny", "library_name": "peft", "pipeline_tag": "text-classification",
        "tags": ["bhpeft", "lora"],
    }  # fmt: skip
    assert "More Information Needed" not in body and "To be filled in" in body
    for words in (
        "# strong", "films.csv: 900 to train on, 200 to test on", "| accuracy | 0.9500 (0.9104 to 0.9726) | 0.5000 |",
        'AutoModelForSequenceClassification.from_pretrained("org/tiny", num_labels=2)',
        'PeftModel.from_pretrained(base, "strong")', "right in 95.0%", "seed 7", "Tested on 200 rows only",
        "commonest label gives an accuracy of 0.5000", "| lora_rank | 8 |",
    ):  # fmt: skip
        assert words in body, words
    # 190 right rows of probabilities 0.7, 0.725, ... 0.925, ten wrong ones of 0.6.
    confidence = float(body.split("a probability of ")[1].split("%")[0]) / 100
    assert 0.79 < confidence < 0.81
    assert "import bhpeft" not in body and "num_virtual_tokens" not in body


def test_a_folder_on_this_machine_is_not_named_in_full(tmp_path):
    make_results(tmp_path)
    record = read_metrics(tmp_path / "metrics" / "texts.json")
    record["config"] |= {"base_model": str(tmp_path / "bases" / "my-llama"), "dataset_name": str(tmp_path / "a.csv")}
    record["config"] |= {"adapter_name": "bh-peft", "kl_weight": 0.5}
    text = model_card("texts", record, [], False)
    assert str(tmp_path) not in text and "`my-llama`" in text and "on a.csv" in text
    head, body = head_of(text)
    assert "base_model" not in head and head["pipeline_tag"] == "text-generation"
    assert "import bhpeft" in body and "AutoModelForCausalLM" in body and "| kl_weight | 0.5000 |" not in body
    assert "| kl_weight | 0.5 |" in body and "judged by no one" in body
