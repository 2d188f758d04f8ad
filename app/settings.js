(names, kinds) => {
  // Settings in the address (?p=0.7&seed=3) win over those that this browser kept; what fits neither is left as it is.
  const STORE = 'modification-settings';
  const LIMIT = 200000;

  const parse = (name, text) => {
    if (kinds[name] === 'Checkbox') return text === 'true' ? true : text === 'false' ? false : undefined;
    if (kinds[name] === 'Slider' || kinds[name] === 'Number') {
      const value = Number(text);
      return text.trim() !== '' && Number.isFinite(value) ? value : undefined;
    }
    return text && text.length <= LIMIT ? text : undefined;
  };
  const kept = () => { try { return JSON.parse(localStorage.getItem(STORE)) || {}; } catch { return {}; } };

  return {
    restore: (values) => {
      const address = new URLSearchParams(location.search), memory = kept();
      return values.map((value, at) => {
        const name = names[at], given = address.get(name);
        const fromLink = given === null ? undefined : parse(name, given);
        if (fromLink !== undefined) return fromLink;
        const before = typeof memory[name] === 'undefined' || memory[name] === null ? undefined
          : parse(name, String(memory[name]));
        return before === undefined ? value : before;
      });
    },
    keep: (values) => {
      localStorage.setItem(STORE, JSON.stringify(Object.fromEntries(names.map((name, at) => [name, values[at]]))));
    },
    link: (values) => {
      const address = new URL(location.href);
      address.search = new URLSearchParams(names.map((name, at) => [name, values[at] === null ? '' : values[at]]));
      if (navigator.clipboard) navigator.clipboard.writeText(address.href).catch(() => {});
      return address.href;
    },
    forget: () => {
      localStorage.removeItem(STORE);
      location.href = location.origin + location.pathname;
    },
  };
}
