// A small web service with the usual companions of express; answers HTTP on $PORT.
const axios = require('axios');
const ejs = require('ejs');
const express = require('express');
const lodash = require('lodash');
const moment = require('moment');
const logger = require('pino')();

const port = Number(process.env.PORT || 8080);
const page = ejs.compile('<p><%= words.join(" ") %> at <%= time %>, axios <%= version %></p>\n');
const app = express();

app.get('/', (request, response) => {
  const words = lodash.shuffle(['hello', 'from', 'express']);
  response.send(page({ words, time: moment.utc().format(), version: axios.VERSION }));
});
app.listen(port, '0.0.0.0', () => logger.info({ port }, 'listening'));
