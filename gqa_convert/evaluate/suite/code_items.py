"""Small functions to write, each with tests: in the form of HumanEval (Chen et al. 2021), the items our own."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class CodeItem:
    """A function: how it is asked for, a body that is right, and what must hold of it."""

    prompt: str
    solution: str
    tests: str


def _item(signature: str, says: str, solution: str, *tests: str) -> CodeItem:
    name = signature.split("(", 1)[0]
    call, value = tests[0].split(" == ", 1)
    prompt = f'def {signature}:\n    """{says}\n\n    >>> {call}\n    {value}\n    """\n'
    body = "".join(f"    {line}\n" for line in solution.split("\n"))
    return CodeItem(prompt, body, f"assert callable({name})\n" + "".join(f"assert {test}\n" for test in tests))


ITEMS: tuple[CodeItem, ...] = (
    _item("double_all(numbers)", "Return a list with every number doubled.", "return [2 * n for n in numbers]",
          "double_all([1, 2, 3]) == [2, 4, 6]", "double_all([]) == []", "double_all([-5, 0]) == [-10, 0]"),
    _item("count_vowels(text)", "Return how many letters of the text are vowels (a, e, i, o, u), small or capital.",
          "return sum(c in 'aeiouAEIOU' for c in text)",
          "count_vowels('Apple pie') == 4", "count_vowels('rhythm') == 0", "count_vowels('') == 0"),
    _item("is_palindrome(text)", "Return True if the text reads the same backwards, else False.",
          "return text == text[::-1]",
          "is_palindrome('level') == True", "is_palindrome('levels') == False", "is_palindrome('') == True"),
    _item("largest(numbers)", "Return the largest number of a list that is not empty.", "return max(numbers)",
          "largest([3, 9, 2]) == 9", "largest([-4, -2, -7]) == -2", "largest([5]) == 5"),
    _item("factorial(n)", "Return n! for a whole number n >= 0.",
          "result = 1\nfor i in range(2, n + 1):\n    result *= i\nreturn result",
          "factorial(5) == 120", "factorial(0) == 1", "factorial(10) == 3628800"),
    _item("only_even(numbers)", "Return the even numbers of a list, in their order.",
          "return [n for n in numbers if n % 2 == 0]",
          "only_even([1, 2, 3, 4]) == [2, 4]", "only_even([7]) == []", "only_even([0, -2, 5]) == [0, -2]"),
    _item("reverse_words(sentence)", "Return the words of a sentence in reverse order, joined by one space.",
          "return ' '.join(sentence.split()[::-1])",
          "reverse_words('the quick fox') == 'fox quick the'", "reverse_words('one') == 'one'"),
    _item("remove_duplicates(items)", "Return the items without repetitions, in the order in which they come first.",
          "return list(dict.fromkeys(items))",
          "remove_duplicates([3, 1, 3, 2, 1]) == [3, 1, 2]", "remove_duplicates([]) == []"),
    _item("celsius_to_fahrenheit(degrees)", "Convert degrees Celsius to degrees Fahrenheit.",
          "return degrees * 9 / 5 + 32",
          "celsius_to_fahrenheit(100) == 212.0", "celsius_to_fahrenheit(0) == 32.0",
          "celsius_to_fahrenheit(-40) == -40.0"),
    _item("is_prime(n)", "Return True if the whole number n is a prime, else False.",
          "if n < 2:\n    return False\nreturn all(n % i for i in range(2, int(n ** 0.5) + 1))",
          "is_prime(7) == True", "is_prime(1) == False", "is_prime(91) == False", "is_prime(97) == True"),
    _item("sum_of_digits(n)", "Return the sum of the decimal digits of a whole number n >= 0.",
          "return sum(int(d) for d in str(n))",
          "sum_of_digits(1234) == 10", "sum_of_digits(0) == 0", "sum_of_digits(9090) == 18"),
    _item("fibonacci(n)", "Return the n-th Fibonacci number, with fibonacci(0) = 0 and fibonacci(1) = 1.",
          "a, b = 0, 1\nfor _ in range(n):\n    a, b = b, a + b\nreturn a",
          "fibonacci(7) == 13", "fibonacci(0) == 0", "fibonacci(20) == 6765"),
    _item("longest_word(sentence)", "Return the longest word of a sentence; the first of them if several are as long.",
          "return max(sentence.split(), key=len)",
          "longest_word('a small elephant') == 'elephant'", "longest_word('two ten six') == 'two'"),
    _item("count_words(text)", "Return a dictionary of how often each word occurs in the text.",
          "counts = {}\nfor word in text.split():\n    counts[word] = counts.get(word, 0) + 1\nreturn counts",
          "count_words('a b a') == {'a': 2, 'b': 1}", "count_words('') == {}"),
    _item("flatten(lists)", "Join a list of lists into one list.", "return [item for part in lists for item in part]",
          "flatten([[1], [2, 3]]) == [1, 2, 3]", "flatten([]) == []", "flatten([[], [4]]) == [4]"),
    _item("clamp(value, low, high)", "Return the value, or the nearer bound if it lies outside of low to high.",
          "return max(low, min(value, high))",
          "clamp(15, 0, 10) == 10", "clamp(-3, 0, 10) == 0", "clamp(4, 0, 10) == 4"),
    _item("gcd(a, b)", "Return the greatest common divisor of two positive whole numbers.",
          "while b:\n    a, b = b, a % b\nreturn a",
          "gcd(12, 18) == 6", "gcd(7, 5) == 1", "gcd(100, 10) == 10"),
    _item("second_smallest(numbers)", "Return the second smallest of the different numbers of a list.",
          "return sorted(set(numbers))[1]",
          "second_smallest([5, 1, 4, 1]) == 4", "second_smallest([2, 3]) == 3"),
    _item("is_anagram(first, second)", "Return True if both words are made of the same letters, else False.",
          "return sorted(first) == sorted(second)",
          "is_anagram('listen', 'silent') == True", "is_anagram('aab', 'abb') == False"),
    _item("running_total(numbers)", "Return a list of the sums of the first one, two, three, ... numbers.",
          "total, totals = 0, []\nfor n in numbers:\n    total += n\n    totals.append(total)\nreturn totals",
          "running_total([1, 2, 3]) == [1, 3, 6]", "running_total([]) == []", "running_total([5, -5]) == [5, 0]"),
)  # fmt: skip
STOPS = ("\ndef ", "\nclass ", "\nprint", "\nif ", "\n#", "\nassert", "\n>>>", "\n@", "\nfrom ", "\nimport ", "\n```")
"""Where what is written no longer belongs to the function."""
