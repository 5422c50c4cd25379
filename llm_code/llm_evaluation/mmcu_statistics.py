"""Records of an MMCU run summed up, in both readings, and two runs compared. Pure functions of the records.

A record is one question: row, domain, subject, prompt, gold, predicted, correct, answer in the strict reading, and the
same four with official_ before them in the benchmark's own.
"""

from collections.abc import Sequence
from typing import Any

from finetune.paired_scores import check_same_rows
from finetune.statistics import compare, holm, mean, share
from llm_code.llm_evaluation.mmcu_data import DOMAINS, Question
from llm_code.llm_evaluation.mmcu_prompts import options_text
from llm_code.llm_evaluation.mmcu_scoring import (
    NO_ANSWER,
    official_gold,
    official_prediction,
    strict_gold,
    strict_prediction,
)

Record = dict[str, Any]
PREFIXES = {"official": "official_", "strict": ""}
INVALID = {"official": NO_ANSWER, "strict": ""}


def asked(question: Question) -> Record:
    """The part of a question's record that is known before it is answered."""
    return {
        "row": question.row,
        "domain": question.domain,
        "subject": question.subject,
        "prompt": question.text + options_text("strict", question),
        "gold": strict_gold(question.answer),
    }


def make_record(question: Question, official_answer: str, strict_answer: str) -> Record:
    """One question with the answers to its two prompts."""
    known, predicted = asked(question), strict_prediction(strict_answer)
    script_gold, script_predicted = official_gold(question.answer), official_prediction(official_answer)
    return known | {
        "predicted": predicted,
        "correct": bool(predicted) and predicted == known["gold"],
        "answer": strict_answer,
        "official_gold": script_gold,
        "official_predicted": script_predicted,
        "official_correct": script_predicted == script_gold,
        "official_answer": official_answer,
    }


def by_subject(records: Sequence[Record]) -> dict[str, list[Record]]:
    """Records of each subject, in their order."""
    subjects: dict[str, list[Record]] = {}
    for record in records:
        subjects.setdefault(record["subject"], []).append(record)
    return subjects


def count(records: Sequence[Record], mode: str) -> dict[str, Any]:
    """Accuracy with its interval, of all and of questions with one and with several letters; invalid answers."""
    key = PREFIXES[mode]
    single = [record for record in records if len(record["gold"]) == 1]
    several = [record for record in records if len(record["gold"]) > 1]
    parts = {"accuracy": records, "single": single, "several": several}
    scores = {name: share(sum(record[key + "correct"] for record in part), len(part)) for name, part in parts.items()}
    return scores | {"invalid": sum(record[key + "predicted"] == INVALID[mode] for record in records)}


def summarise(records: Sequence[Record], mode: str) -> dict[str, Any]:
    """Scores of every subject, domain and all.

    A domain's macro score is the unweighted mean of its subjects, the overall one the mean of the domains; micro scores
    count every question alike.
    """
    subjects = {name: count(part, mode) | {"domain": part[0]["domain"]} for name, part in by_subject(records).items()}
    domains = {}
    for domain in sorted({record["domain"] for record in records}, key=_domain_rank):
        values = [scores["accuracy"]["value"] for scores in subjects.values() if scores["domain"] == domain]
        part = [record for record in records if record["domain"] == domain]
        domains[domain] = {"macro": mean(values), "subjects": len(values)} | count(part, mode)
    overall = {"macro": mean([scores["macro"] for scores in domains.values()])} | count(records, mode)
    return {"overall": overall, "domains": domains, "subjects": subjects}


def _domain_rank(domain: str) -> tuple[int, str]:
    return (DOMAINS.index(domain) if domain in DOMAINS else len(DOMAINS), domain)


def compare_runs(records: Sequence[Record], others: Sequence[Record], other_name: str) -> dict[str, Any]:
    """Paired differences to another run, McNemar's exact test, by subject with Holm's adjustment over them.

    Raises UserError when the other run did not answer the same questions.
    """
    check_same_rows(records, others, other_name)
    result: dict[str, Any] = {"other": other_name}
    for mode, prefix in PREFIXES.items():
        key, ours, theirs = prefix + "correct", by_subject(records), by_subject(others)
        subjects = {name: _compare(part, theirs[name], key) for name, part in ours.items()}
        adjusted = holm([scores["mcnemar_exact_p"] for scores in subjects.values()])
        for scores, p in zip(subjects.values(), adjusted, strict=True):
            scores["holm_p"] = p
        result[mode] = {"overall": _compare(records, others, key), "subjects": subjects}
    return result


def _compare(records: Sequence[Record], others: Sequence[Record], key: str) -> dict[str, Any]:
    scores = compare([record[key] for record in records], [record[key] for record in others])
    return {"difference": scores["accuracy"]["value"] - scores["other_accuracy"]["value"]} | scores


def subject_file(records: Sequence[Record]) -> str:
    """The text of one subject's file as the benchmark's script writes it."""
    lines = [f"{r['official_predicted']}|||{r['official_gold']}|||{r['official_correct']}\n" for r in records]
    accuracy = sum(record["official_correct"] for record in records) / len(records)
    return "".join(lines) + f"Average accuracy {accuracy:.3f} - {records[0]['subject']}\n"
