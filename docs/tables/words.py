"""The words of table cells and lists, in English and Chinese."""

ZH = {
    "outside": "外",
    "under": "内",
    "inside": "内",
    "or": "或",
    "any": "任意",
    "none": "无",
    "no momentum": "无动量",
    "decoupled": "解耦",
    "corrected": "修正",
    "option": "可选",
    "always": "是",
    "never": "否",
    "fixed": "固定",
    "run": "实跑",
    "transcription": "转写",
    "negative": "符号相反",
    "no default": "没有默认值",
}


class Words:
    """Cells and lists in one language."""

    def __init__(self, language):
        self.chinese = language == "zh"
        self.comma, self.colon = ("，", "：") if self.chinese else (", ", ": ")
        self.semicolon, self.stop = ("；", "。") if self.chinese else ("; ", ". ")

    def __call__(self, word):
        return ZH.get(word, word) if self.chinese else word

    def of(self, text):
        """The language's own, of a text or a pair of texts."""
        return text if isinstance(text, str) else text[self.chinese]

    def either(self, choices):
        """Choices such as `L2, decoupled or corrected`."""
        *first, last = map(self, choices)
        if not first:
            return last
        between = "" if self.chinese else " "
        listed = ("、" if self.chinese else ", ").join(first)
        return f"{listed}{between}{self('or')}{between}{last}"

    def listed(self, names):
        return ("、" if self.chinese else ", ").join(names)
