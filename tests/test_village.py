"""lab/village.py: the true reward, and which questions are asked where."""

import math

from lab import village


def test_reward_by_hand():
    job, pet = village.TRUTH["Mara", "job"], village.TRUTH["Mara", "pet"]
    wrong = next(value for value in village.VALUES["job"] if value != job)
    prompt = "What does Mara do for work?"
    for response, expected in [
        (f" Gladly! Mara is a {job}. Take care!", 3),
        (f" Mara is a {job}.", 1),
        (f" Mara is a {wrong}.", -1),
        (f" Well, Mara is a {job}. That is all.", 1),
        (f" Ugh. Mara is a {job}. Have fun!", 1),
        (f" Not again. Mara is a {wrong}. Go away.", -3),
        (f" Mara keeps a {pet}.", -3),  # true, but no answer to this question
        (f" Nils is a {job}.", -3),
        (f" Gladly! Gladly! Mara is a {job}.", -3),
        (f"Mara is a {job}.", -3),
        (" Gladly! Take care!", -3),
        ("", -3),
    ]:
        assert village.reward(prompt, response) == expected, response


def test_a_reward_is_made_of_its_parts():
    job = village.TRUTH["Mara", "job"]
    parts = village.reward_parts("What does Mara do for work?")
    made = dict(zip(village.PARTS, parts[f" Gladly! Mara is a {job}. Go away."]))
    assert (made["opening"], made["answer"], made["closing"]) == (1, 1, -1)


def test_the_grammar_has_648_different_responses_a_question():
    for prompt in village.QUESTIONS:
        responses = village.responses(prompt)
        assert len(responses) == 9 * 8 * 9


def test_questions_are_split_without_a_leak():
    train, held_out, never = village.split_questions()
    assert len({*train, *held_out, *never}) == len(train) + len(held_out) + len(never)
    facts = [{village.QUESTIONS[q] for q in part} for part in (train, held_out, never)]
    assert facts[0] == facts[1] and not facts[0] & facts[2]
    assert not {prompt for prompt, _ in village.demonstrations(train, 500, 0)} - {*train}


def test_texts_to_train_on_are_of_this_seed_and_those_to_test_on_of_the_next():
    """700 tokens are 20 stories of 35, and 200 more to be safe."""
    (corpus, unseen), (demos, unseen_demos) = village.training_texts(700, 30, seed=3)
    train, held_out, never = village.split_questions()
    assert corpus == village.stories(220, 3) and unseen == village.stories(500, 4)
    assert demos == village.demonstrations(train, 30, 3)
    assert unseen_demos == village.demonstrations(held_out, 1000, 4)
    assert (len(train), len(held_out), len(never)) == (360, 120, 48)


def test_demonstrations_are_wrong_one_time_in_five():
    train, *_ = village.split_questions()
    demos = village.demonstrations(train, 4000, seed=0)
    wrong = sum(
        not any(answer in text for answer, side in village.answers(prompt).items() if side == 1)
        for prompt, text in demos
    )
    assert abs(wrong / 4000 - 0.2) < 5 * math.sqrt(0.2 * 0.8 / 4000)  # five standard errors
    assert all(text in village.responses(prompt) for prompt, text in demos)
    assert village.demonstrations(train, 50, seed=1) == village.demonstrations(train, 50, seed=1)
