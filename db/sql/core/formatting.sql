-- Times and amounts as text.

create or replace function surety.format_time(p_at timestamptz) returns text
language sql stable parallel safe
begin atomic
    select to_char(p_at at time zone 'UTC', 'YYYY-MM-DD"T"HH24:MI:SS.MS"Z"');
end;

comment on function surety.format_time(timestamptz) is
'A time as the API shows it: RFC 3339, in UTC, with milliseconds.';

create or replace function surety.format_amount(p_amount_minor bigint, p_currency text) returns text
language sql stable parallel safe set search_path = pg_catalog, pg_temp
begin atomic
    select round(p_amount_minor / 10.0 ^ currencies.exponent, currencies.exponent) || ' ' || upper(p_currency)
    from surety.currencies
    where currencies.currency = p_currency;
end;

comment on function surety.format_amount(bigint, text) is
'An amount in major units with its currency, for people: 49.99 USD.';
