/** Where the classifier's page has its answers from: the server. */
const source = {
  times: "Times are of this run through all layers.",
  about: async () => (await send("layers")).json(),
  layers: async (inputs, point) => (await send("layers", { inputs, operating_point: point })).json(),
  begin: beginWithToken,
};
