// What the page does in the browser: keep conversations, download files, and leave Enter to input methods.

(() => {
  document.documentElement.lang = "zh-CN";

  // One entry a conversation, so that two tabs do not overwrite each other's.
  const PREFIX = "baichuan-web/";
  const read = (id) => localStorage.getItem(PREFIX + id) || "";
  const records = () =>
    Object.keys(localStorage)
      .filter((key) => key.startsWith(PREFIX))
      .map((key) => JSON.parse(localStorage.getItem(key)))
      .sort((a, b) => b.time - a.time);

  const content = ({ messages, system }) => JSON.stringify([messages, system]);

  // The browser has room for about five million characters: the oldest conversations make room for the newest.
  const write = (record) => {
    for (;;) {
      try {
        return localStorage.setItem(PREFIX + record.id, JSON.stringify(record));
      } catch (error) {
        const oldest = records().filter((other) => other.id !== record.id).pop();
        if (!oldest) return console.error(error);
        localStorage.removeItem(PREFIX + oldest.id);
      }
    }
  };

  // Each tab reopens its own conversation; a new tab the latest.
  const current = () => sessionStorage.getItem(PREFIX + "current");
  window.chats = {
    list: () => JSON.stringify(records().map(({ id, title }) => [title, id])),
    open: (id) => {
      sessionStorage.setItem(PREFIX + "current", id);
      return read(id);
    },
    last: () => {
      document.querySelector(".sidebar > .toggle-button")?.setAttribute("aria-label", "对话记录");
      if (innerWidth >= 1280) document.querySelector(".sidebar:not(.open) > .toggle-button")?.click();
      const id = current() ?? (records()[0] || { id: "" }).id;
      return window.chats.open(id);
    },
    save: (text) => {
      if (text) {
        const record = JSON.parse(text);
        sessionStorage.setItem(PREFIX + "current", record.id);
        if (!record.messages.length) localStorage.removeItem(PREFIX + record.id);
        else if (content(record) !== content(JSON.parse(read(record.id) || "{}"))) write(record);
      }
      return window.chats.list();
    },
    remove: (text) => text && localStorage.removeItem(PREFIX + JSON.parse(text).id),
    download: (text) => {
      const file = JSON.parse(text);
      const link = document.createElement("a");
      link.href = URL.createObjectURL(new Blob([file.text], { type: file.type }));
      link.download = file.name;
      link.click();
      setTimeout(() => URL.revokeObjectURL(link.href), 1000);
    },
  };

  // Enter that chooses a word in an input method does not send (Safari's comes with keyCode 229 only), nor does Enter
  // while an answer is being written.
  const guard = (event) => {
    if (event.key !== "Enter" || event.shiftKey || !event.target.closest?.("#question")) return;
    const composing = event.isComposing || event.keyCode === 229;
    if (composing || document.querySelector("#question .stop-button")) {
      event.stopImmediatePropagation();
      if (!composing) event.preventDefault();
    }
  };
  for (const kind of ["keydown", "keypress"]) window.addEventListener(kind, guard, true);
})();
